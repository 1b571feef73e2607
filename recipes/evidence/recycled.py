"""Train one recipe with recycled attention and with full attention, and measure each model as it generates.

    python -m sparsetrain.recipes.evidence.recycled recycled --seed 2 --seed 3
    python -m sparsetrain.recipes.evidence.recycled recycled attention.keep=32 # settings as for any run
    python -m sparsetrain.recipes.evidence.recycled recycled-needles --question 26 --seed 2 --seed 3
    python -m sparsetrain.recipes.evidence.recycled recycled-text --seed 2 --seed 3

Every model is measured with three readings: all keys; recycled, which reads all keys every few tokens and chooses; and
a window of at least as many keys.

A recall task is answered by ``generate``. A prompt ends ``--question`` tokens before its first answer and is read in
full. Of the answers that follow, those count whose steps read a choice of an earlier token. The perplexity of text is
that of one pass whose rows are steps of generation behind the first token of each window. Runs are those of
:mod:`~sparsetrain.recipes.evidence.run`, and are not repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from sparsetrain.recipes.evidence.run import ANSWERS, SLIDING_BLOCK, opened, train
from sparsetrain.recipes.evidence.run import Outcome as Run
from sparsetrain.recipes.evidence.run import table as table_of_runs

from sparsetrain.cli.entry import run_script
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult, PerplexitySection
from sparsetrain.evaluation.tasks.recall import RecallSection
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.full import FullConfig
from sparsetrain.methods.recycled.method import RecycledConfig
from sparsetrain.methods.sliding import SlidingConfig
from sparsetrain.recipe import Recipe

if TYPE_CHECKING:
    from sparsetrain.evaluation.decode_answers import Question

BEFORE = "before"
PERPLEXITY = "perplexity"
TRAINED = {"full": ["attention.method=full"], "recycled": []}
"""The settings of what is trained."""
BATCH = 100
"""Documents that are answered at a time."""


@dataclass(frozen=True)
class Outcome:
    """What was measured of one model with one reading."""

    trained: str
    """``before``, or the method that it was trained with."""
    reading: str
    """``all keys``, ``recycled`` or ``window``."""
    every: int
    """Tokens between two choices. The window reads as many keys, and counts the same answers."""
    seed: int
    measure: str
    """``answers found``, of those whose steps do not choose (of all, where all keys are read), or ``perplexity``."""
    value: float
    keys: float
    """Keys that a step reads, over those there are, in the mean over all steps, layers and heads."""


def reused(questions: Sequence[Question], every: int) -> list[Question]:
    """The questions with the answers that begin in a step between two choices. The last token of a prompt chooses, and
    writes the first token.

    Raises:
        typer.BadParameter: All begin in one that chooses.
    """
    kept = [
        replace(each, answers={start: answer for start, answer in each.answers.items() if start % every})
        for each in questions
    ]
    if not all(each.answers for each in kept):
        raise typer.BadParameter(f"--every {every}: all answers of a document are written by tokens that choose")
    return kept


def answers(
    model: str, recipe: Recipe, trained: str, seed: int, lengths: Sequence[int], question: int = 0
) -> list[Outcome]:
    """What a model finds with each reading and each number of tokens between two choices.

    Args:
        model: a folder of a run or of a model.
        recipe: its recall task is asked, with documents of ``seed``, and its attention is recycled.
        question: tokens before the first answer that are read in steps.
    """
    from sparsetrain.evaluation.decode_answers import Answerer, Question
    from sparsetrain.generation.measured import MeasuredMemory, WindowMemory
    from sparsetrain.generation.settings import parse_decode
    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling import sparsify

    attention, section = recipe.attention, the_task(recipe)
    assert isinstance(attention, RecycledConfig)
    assert isinstance(section, RecallSection)
    source = find_model(model)
    task = section.build(source.tokenizer, seed)
    loaded = sparsify(source.load(None), {"method": "full"}).eval()
    questions = [Question.of(row, question) for row in task.answered() or []]
    beside: dict[str, Any] = {"sinks": attention.sinks, "dense_layers": attention.dense_layers or []}
    window = {"select": "quest", "candidates": 16, **beside}
    whole = Answerer(loaded, source.tokenizer, questions, extra=0, batch=BATCH)
    all_keys = whole.answer(parse_decode({**window, "recent": whole.longest}), WindowMemory)
    outcomes = []
    for every in lengths:
        kept = reused(questions, every)
        answerer = Answerer(loaded, source.tokenizer, kept, extra=0, batch=BATCH)
        fixed = attention.model_copy(update={"generate_every": every}).decode_section()
        chosen = answerer.answer(parse_decode({**fixed, **beside}), MeasuredMemory)
        wide = math.ceil(chosen.mean("keys")) - attention.sinks
        near = answerer.answer(parse_decode({**window, "recent": wide}), WindowMemory)
        for reading, measured in (("all keys", all_keys), ("recycled", chosen), ("window", near)):
            found = sum(measured.found) / len(measured.found)
            keys = measured.mean("keys") / measured.mean("length")
            outcomes.append(Outcome(trained, reading, every, seed, ANSWERS, found, keys))
    return outcomes


def perplexities(model: str, recipe: Recipe, trained: str, seed: int, lengths: Sequence[int]) -> list[Outcome]:
    """The perplexity of a model with each reading and each number of tokens between two choices, at the one length of
    the recipe's perplexity task. A window grows from the start of a block to its end, as in ``attention.method:
    sliding``.

    Args:
        model: a folder of a run or of a model.
        recipe: its perplexity task is measured, and its attention is recycled.
    """
    import torch

    from sparsetrain.evaluation.runner import evaluate
    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling import sparsify
    from sparsetrain.world import World

    attention, section = recipe.attention, the_task(recipe)
    assert isinstance(attention, RecycledConfig)
    assert isinstance(section, PerplexitySection)
    (length,) = section.lengths
    source = find_model(model)
    loaded = source.load(None)
    world = World(0, 1, torch.device("cpu"))

    def perplexity(config: MethodConfig) -> float:
        sparsify(loaded, config)
        result = evaluate(loaded, source.tokenizer, recipe.eval, world, seed=seed).tasks[section.label]
        assert isinstance(result, PerplexityResult)
        return result.perplexity[length]

    all_keys = perplexity(FullConfig())
    outcomes = []
    for every in lengths:
        fixed = attention.model_copy(update={"every": every, "generate_every": None})
        near = window_of(fixed.build().density(length), length, attention.sinks)
        outcomes.append(Outcome(trained, "all keys", every, seed, PERPLEXITY, all_keys, 1.0))
        for reading, config in {"recycled": fixed, "window": near}.items():
            keys = config.build().density(length)
            outcomes.append(Outcome(trained, reading, every, seed, PERPLEXITY, perplexity(config), keys))
    return outcomes


def window_of(density: float, length: int, sinks: int) -> SlidingConfig:
    """The smallest window in blocks, with the first block where there are sinks, in which the tokens of a text of
    ``length`` tokens read at least a share ``density`` of all keys before them."""
    for window in range(1, math.ceil(length / SLIDING_BLOCK) + 1):
        config = SlidingConfig(block=SLIDING_BLOCK, window=window, sinks=min(1, sinks))
        if config.build().density(length) >= density:
            break
    return config


def the_task(recipe: Recipe) -> RecallSection | PerplexitySection:
    """The task of a recipe.

    Raises:
        typer.BadParameter: It has none that is compared, or several.
    """
    found = [each for each in recipe.eval.tasks if isinstance(each, RecallSection | PerplexitySection)]
    if len(found) != 1 or (isinstance(found[0], PerplexitySection) and len(found[0].lengths) != 1):
        raise typer.BadParameter("eval.tasks: the comparison needs one task: recall, or perplexity at one length")
    return found[0]


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each training and reading, what was measured by tokens between two choices and seed, and the
    keys that were read."""
    columns = sorted({(outcome.every, outcome.seed) for outcome in outcomes})
    names = [f"every {every}, seed {seed}" for every, seed in columns]
    lines = [f"| trained | reads | {' | '.join(names)} |", "| --- | --- |" + " ---: |" * len(columns)]
    for trained, reading in dict.fromkeys((outcome.trained, outcome.reading) for outcome in outcomes):
        of = {(o.every, o.seed): o for o in outcomes if (o.trained, o.reading) == (trained, reading)}
        cells = [_cell(of[column]) for column in columns]
        lines.append(f"| {trained} | {reading} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome) -> str:
    value = f"{outcome.value:.1%}" if outcome.measure == ANSWERS else f"{outcome.value:.2f}"
    return f"{value} ({outcome.keys:.0%})"


def main(
    recipe: Annotated[str, typer.Argument(help="recycled, recycled-needles, recycled-text, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each training; 0 and 1 by default.")] = None,
    every: Annotated[
        list[int] | None, typer.Option(help="Tokens between two choices; attention.every by default.")
    ] = None,
    question: Annotated[int, typer.Option(help="Tokens before the first answer that are read one by one.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Compare generation with recycled attention before and after training with it, and with full attention."""
    file, loaded = opened(recipe, settings)
    attention = loaded.attention
    if not isinstance(attention, RecycledConfig):
        raise typer.BadParameter(f"{file} has attention.method={attention.method}; the comparison starts from recycled")
    if loaded.model.path is None:
        raise typer.BadParameter(f"{file} has no model.path; the comparison starts from a model that can do the task")
    asked = isinstance(the_task(loaded), RecallSection)
    if question and not asked:
        raise typer.BadParameter(f"--question {question}: {file} measures perplexity, not answers; leave it out")
    measure = partial(answers, question=question) if asked else perplexities
    out = out or Path("runs/evidence") / file.stem
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    runs: list[Run] = []
    for number in seed or [0, 1]:
        models = {BEFORE: loaded.model.path}
        for trained, own in TRAINED.items():
            folder = out / f"{trained}-{number}"
            runs.append(train(file, trained, number, ["checkpoint.export=true", *(settings or []), *own], folder))
            models[trained] = str(folder)
        for trained, model in models.items():
            outcomes += measure(model, loaded, trained, number, every or attention.lengths)
            print(table([each for each in outcomes if (each.trained, each.seed) == (trained, number)]), flush=True)
    written = {"measured": [asdict(each) for each in outcomes], "runs": [asdict(each) for each in runs]}
    (out / "table.json").write_text(json.dumps(written, indent=1) + "\n")
    told = f"{table(outcomes)}\nEach run by its own method, before and after training:\n\n{table_of_runs(runs)}"
    (out / "table.md").write_text(told)
    print(told)


if __name__ == "__main__":
    run_script(main)
