"""Does training with the keys that hold a share of the weight make a model need fewer of them?

    python -m sparsetrain.recipes.evidence.top_p recall-finetune --seed 2 --seed 3
    python -m sparsetrain.recipes.evidence.top_p recycled-text --seed 2 --seed 3
    python -m sparsetrain.recipes.evidence.top_p recall-finetune train.steps=100 # settings as for any run

The model of a recipe is trained on with full attention and with
:class:`~sparsetrain.recipes.evidence.top_p_method.TopPConfig`. Answers are generated under Twilight, with its published
p, and with half, a quarter and an eighth of the keys that the untrained model keeps with it: for each model, p is
fitted to that. The perplexity of text is that of passes that read by exact weights, for a few p. Runs are those of
:mod:`~sparsetrain.recipes.evidence.run`, and are not repeated.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from sparsetrain.recipes.evidence.recycled import BATCH, BEFORE, PERPLEXITY, the_task
from sparsetrain.recipes.evidence.run import ANSWERS, opened, train
from sparsetrain.recipes.evidence.top_p_method import KEYS, TopPConfig, register

from sparsetrain.cli.entry import run_script
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult, PerplexitySection
from sparsetrain.evaluation.tasks.recall import RecallSection
from sparsetrain.recipe import Recipe

if TYPE_CHECKING:
    from sparsetrain.evaluation.decode_answers import Answerer, Measured

TRAINED = {
    "full": ["attention.method=full", "train.new_modules_lr=null"],
    "top-p": ["attention.method=top-p", "train.new_modules_lr=null"],
}
"""The settings of what is trained."""
PUBLISHED_P = 0.95
"""Of Twilight on all keys."""
SHARES_OF_KEYS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
"""Of those that the untrained model keeps with that p."""
TEXT_P = (1.0, 0.9, 0.8, 0.6)
"""The shares of the weight with which text is read."""
QUESTION = 2
"""Tokens before the first answer that are read under Twilight, so that its steps write every answer."""
FITTED = 8
"""Documents on which p is fitted. Only the keys that are read there are looked at."""


@dataclass(frozen=True)
class Outcome:
    """What was measured of one model with one share of the weight."""

    reads: str
    """``p = 0.95``, or how many of the keys that the untrained model keeps with that: ``1/2 of the keys``."""
    trained: str
    """``before``, or the method that it was trained with."""
    seed: int
    p: float
    keys: float
    """Keys that a token and KV head read, in the mean."""
    measure: str
    """``answers found``, or ``perplexity``."""
    value: float
    error: float | None = None
    """Of a layer's output, as in ``sparsetrain compare-decode``."""


class Twilight:
    """Answers of one model under Twilight, by p.

    Args:
        model: a folder of a run or of a model.
        recipe: its recall task is asked, with documents of ``seed``.
    """

    def __init__(self, model: str, recipe: Recipe, seed: int) -> None:
        from sparsetrain.evaluation.decode_answers import Answerer, Question
        from sparsetrain.inference.models import find_model
        from sparsetrain.modeling import sparsify

        section = the_task(recipe)
        assert isinstance(section, RecallSection)
        source = find_model(model)
        questions = [Question.of(row, QUESTION) for row in section.build(source.tokenizer, seed).answered() or []]
        loaded = sparsify(source.load(None), {"method": "full"}).eval()
        self._answerer: Answerer = Answerer(loaded, source.tokenizer, questions, extra=0, batch=BATCH)
        self._read: dict[float, float] = {}

    def answers(self, p: float, first: int | None = None) -> Measured:
        """What is found in the first documents, or in all. Every key besides a token's own has to be chosen."""
        from sparsetrain.generation.measured import MeasuredMemory
        from sparsetrain.generation.settings import parse_decode

        section: dict[str, Any] = {"prune": {"p": p, "min_keys": 1}, "sinks": 0, "recent": 1, "dense_layers": []}
        return self._answerer.answer(parse_decode(section), MeasuredMemory, first=first)

    def keys(self, p: float) -> float:
        """Keys that a step reads in the documents to fit p on."""
        if p not in self._read:
            self._read[p] = self.answers(p, FITTED).mean("keys")
        return self._read[p]

    def fitted(self, budget: float) -> float:
        """The largest p with which a step reads no more keys, or the least that is tried."""
        from sparsetrain.evaluation.decode_settings import SHARES

        return SHARES[max(0, bisect_right(SHARES, budget, key=self.keys) - 1)]


def answers(models: dict[str, str], recipe: Recipe, seed: int) -> list[Outcome]:
    """What each model finds; that called ``before`` says how many keys there are to halve.

    Args:
        models: folders of runs or of models, by what they were trained with.
    """
    asked = {trained: Twilight(model, recipe, seed) for trained, model in models.items()}
    whole = asked[BEFORE].keys(PUBLISHED_P)
    outcomes = []
    for share in (1, *SHARES_OF_KEYS):
        for trained, twilight in asked.items():
            p = PUBLISHED_P if share == 1 else twilight.fitted(float(whole * share))
            reads = f"p = {p}" if share == 1 else f"{share} of the keys"
            found = twilight.answers(p)
            value = sum(found.found) / len(found.found)
            outcomes.append(Outcome(reads, trained, seed, p, found.mean("keys"), ANSWERS, value, found.mean("error")))
    return outcomes


def perplexities(models: dict[str, str], recipe: Recipe, seed: int) -> list[Outcome]:
    """The perplexity of each model at the one length of the recipe's task, with each p.

    Args:
        models: folders of runs or of models, by what they were trained with.
    """
    import torch

    from sparsetrain.evaluation.runner import evaluate
    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling import sparsify
    from sparsetrain.modeling.layers import sparse_layers
    from sparsetrain.world import World

    section = the_task(recipe)
    assert isinstance(section, PerplexitySection)
    (length,) = section.lengths
    world = World(0, 1, torch.device("cpu"))
    sources = {trained: find_model(model) for trained, model in models.items()}
    loaded = {trained: source.load(None) for trained, source in sources.items()}
    outcomes = []
    for p in TEXT_P:
        for trained, model in loaded.items():
            sparsify(model, TopPConfig(p=p))
            method = sparse_layers(model)[0][2]
            assert method is not None
            method.observing = True
            result = evaluate(model, sources[trained].tokenizer, recipe.eval, world, seed=seed).tasks[section.label]
            assert isinstance(result, PerplexityResult)
            keys = method.observations()[KEYS]
            outcomes.append(Outcome(f"p = {p}", trained, seed, p, keys, PERPLEXITY, result.perplexity[length]))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each share, training and seed."""
    lines = [
        f"| reads | trained with | seed | p | keys | {outcomes[0].measure} | error |",
        "| --- | --- |" + " ---: |" * 5,
    ]
    for each in sorted(outcomes, key=lambda each: [other.reads for other in outcomes].index(each.reads)):
        value = f"{each.value:.1%}" if each.measure == ANSWERS else f"{each.value:.2f}"
        error = "" if each.error is None else f"{each.error:.3f}"
        cells = (each.reads, each.trained, each.seed, f"{each.p:.3f}", f"{each.keys:.1f}", value, error)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(
    recipe: Annotated[str, typer.Argument(help="recall-finetune, recycled-text, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each training; 0 and 1 by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/top-p-RECIPE.")] = None,
) -> None:
    """Compare what models need to read after training with top-p attention and with full attention."""
    register()
    file, loaded = opened(recipe, settings)
    if loaded.model.path is None:
        raise typer.BadParameter(f"{file} has no model.path; the comparison starts from a model that can do the task")
    measure = answers if isinstance(the_task(loaded), RecallSection) else perplexities
    out = out or Path("runs/evidence") / f"top-p-{file.stem}"
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    seconds: dict[str, float] = {}
    for number in seed or [0, 1]:
        models = {BEFORE: loaded.model.path}
        for trained, own in TRAINED.items():
            folder = out / f"{trained}-{number}"
            given = ["checkpoint.export=true", *(settings or []), *own]
            run = train(file, trained, number, given, folder, program=register.__module__)
            models[trained], seconds[folder.name] = str(folder), run.seconds
        outcomes += measure(models, loaded, number)
        print(table([each for each in outcomes if each.seed == number]), flush=True)
    written = {"measured": [asdict(each) for each in outcomes], "seconds": seconds}
    (out / "table.json").write_text(json.dumps(written, indent=1) + "\n")
    (out / "table.md").write_text(table(outcomes))
    print(table(outcomes))


if __name__ == "__main__":
    run_script(main)
