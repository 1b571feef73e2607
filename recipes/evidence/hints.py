"""Train one recipe with every method at one budget of keys, where the future need is known early and where it is not.

    python -m sparsetrain.recipes.evidence.hints hints --seed 2 --seed 3
    python -m sparsetrain.recipes.evidence.hints hints --hint mark --only power --only sparsek

``question``: a document begins with the keys that will be asked for; ``mark``: one token stands in front of their
facts; ``none``: nothing tells before the end. Only with a hint can a method that drops keys know which ones to keep.
Runs are those of :mod:`~sparsetrain.recipes.evidence.run`, and are not repeated.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from sparsetrain.recipes.evidence.relay import at_one_budget, num_blocks, the_power
from sparsetrain.recipes.evidence.run import ANSWERS, attention_setting, choose, opened, train

from sparsetrain.cli.entry import run_script
from sparsetrain.recipe import Recipe

HINTS = ("question", "mark", "none")
SCORERS = "train.new_modules_lr=1.0e-2"
"""SparseK's start from a guess."""


@dataclass(frozen=True)
class Outcome:
    """What one run found."""

    method: str
    hint: str
    seed: int
    found: float
    """Share of the answers."""
    loss: float


def methods(recipe: Recipe) -> dict[str, list[str]]:
    """The settings of each method, all with as many keys at most as the recipe's power has."""
    power, blocks = the_power(recipe), num_blocks(recipe)
    budget = power.pattern().max_key_blocks(blocks) - power.sinks
    # A sixth is chosen: three times as many as are asked for, and a third of those that could be.
    sparsek: dict[str, Any] = {
        "method": "sparsek",
        "topk": power.block,
        "window": (budget - 1) * power.block,
        "sinks": power.sinks * power.block,
        "slope": 0.0,
        "topk_start": blocks * power.block // 2,
        "topk_steps": 0.6,
    }
    sections = {"full": {"method": "full"}, "sparsek": sparsek, **at_one_budget(power, blocks)}
    settings = {name: [attention_setting(section)] for name, section in sections.items()}
    settings["sparsek"].append(SCORERS)
    return {**settings, "sparsek, frozen scorers": [attention_setting({**sparsek, "scorer": "frozen"})]}


def hinted(recipe: Recipe, hint: str) -> list[str]:
    """The settings with which all documents give a hint."""
    sources = [f"data.sources.{index}.hint={hint}" for index in range(len(recipe.data.sources))]
    return [*sources, *(f"eval.tasks.{task.label}.source.hint={hint}" for task in recipe.eval.tasks)]


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for each method, and a column for each hint, a cell having every seed: found (loss)."""
    hints = list(dict.fromkeys(each.hint for each in outcomes))
    lines = [f"| method | {' | '.join(hints)} |", "| --- |" + " ---: |" * len(hints)]
    for method in dict.fromkeys(each.method for each in outcomes):
        cells = []
        for hint in hints:
            of = sorted((each for each in outcomes if (each.method, each.hint) == (method, hint)), key=_seed)
            cells.append(" / ".join(f"{each.found:.1%} ({each.loss:.3f})" for each in of))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _seed(outcome: Outcome) -> int:
    return outcome.seed


def main(
    recipe: Annotated[str, typer.Argument(help="hints, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each method; 2 and 3 by default.")] = None,
    hint: Annotated[list[str] | None, typer.Option(help="question, mark or none; the first and the last.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Compare methods with one budget of keys where the future need is known, and where it is not."""
    file, loaded = opened(recipe, settings)
    chosen = choose(methods(loaded), only)
    for each in hint or ():
        if each not in HINTS:
            raise typer.BadParameter(f"--hint {each}: choose from {', '.join(HINTS)}")
    out = out or Path("runs/evidence") / file.stem
    out.mkdir(parents=True, exist_ok=True)

    def run(case: tuple[int, str, str]) -> Outcome:
        number, given, name = case
        folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{given}-{number}"
        after = train(file, name, number, [*(settings or []), *hinted(loaded, given), *chosen[name]], folder).after
        outcome = Outcome(name, given, number, after[ANSWERS], after["loss"])
        print(outcome, flush=True)
        return outcome

    with ThreadPoolExecutor(parallel) as pool:
        outcomes = list(pool.map(run, product(seed or [2, 3], hint or ["question", "none"], chosen)))
    (out / "table.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (out / "table.md").write_text(table(outcomes))
    print(table(outcomes))


if __name__ == "__main__":
    run_script(main)
