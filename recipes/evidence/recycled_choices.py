"""Which of the pairs that are asked for later does a choice of recycled attention have?

    cd runs/evidence
    python -m sparsetrain.recipes.evidence.recycled_choices recycled-base recycled/full-2 recycled/recycled-2 --seed 2

Of the recall documents of recycled.yaml, with one choice for all answers (``every: 32``), a line for each model: the
share of later answers whose value some KV head chose, those found, and those found of the chosen ones.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from sparsetrain.recipes.evidence.recycled import the_task
from sparsetrain.recipes.evidence.run import FOLDER
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.cli.entry import run_script
from sparsetrain.evaluation.tasks.recall import Recall
from sparsetrain.methods.recycled.method import RecycledConfig
from sparsetrain.recipe import load_recipe

ONE_CHOICE = 32
"""Tokens of all questions and answers."""


class Choices(TorchDispatchMode):
    """Keeps the choice of the last layer that made one: lists ``[1, Hkv, G, keep]`` and counts ``[1, Hkv, G]``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "sparsetrain::key_choice":
            self.lists, self.counts, _ = out
        return out


def chosen_and_found(model: str, settings: list[str], seed: int) -> np.ndarray:
    """Of each answer but the first of each document, whether its value was chosen and whether it was found, bool
    ``[answers, 2]``.

    Args:
        model: a folder of a run or of a model.
        settings: of the recipe.
        seed: of the documents.
    """
    from sparsetrain.data import collate
    from sparsetrain.evaluation.scoring import predictions
    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling import sparsify

    recipe = load_recipe(FOLDER / "recycled.yaml", settings).recipe
    attention = recipe.attention
    assert isinstance(attention, RecycledConfig)
    source = find_model(model)
    task = the_task(recipe).build(source.tokenizer, seed)
    assert isinstance(task, Recall)
    loaded = sparsify(source.load(None), attention.model_copy(update={"generate_every": ONE_CHOICE})).eval()
    told = []
    for questions in task.passes:
        with torch.no_grad(), Choices() as choices:
            logits, labels, documents = next(predictions(loaded, collate(questions.rows), torch.device("cpu"), 1))
        right = (logits.argmax(-1) == labels).numpy()
        for index, row in enumerate(questions.rows):
            keys = row.input_ids[np.flatnonzero(row.labels >= 0) - 1]
            # Keys are asked for once, and stand once before that.
            values = [int(np.flatnonzero(row.input_ids == key)[0]) + 1 for key in keys]
            heads = zip(choices.lists[0, :, index], choices.counts[0, :, index], strict=True)
            chosen = torch.cat([positions[:count] for positions, count in heads]).numpy()
            told.append(np.stack([np.isin(values, chosen), right[documents.numpy() == index]], 1)[1:])
    return np.concatenate(told)


def main(
    models: Annotated[list[str], typer.Argument(help="Folders of runs or of models, and settings as a.b=c.")],
    seed: Annotated[int, typer.Option(help="Seed of the documents.")] = 2,
) -> None:
    """Tell whether choices have what is asked for later."""
    settings = [each for each in models if "=" in each]
    for model in models:
        if model not in settings:
            told = chosen_and_found(model, settings, seed)
            chosen, found = told.mean(0)
            kept = told[told[:, 0], 1]
            print(f"{model}: chosen {chosen:.1%}, found {found:.1%}, found of the chosen {kept.mean():.1%}", flush=True)


if __name__ == "__main__":
    run_script(main)
