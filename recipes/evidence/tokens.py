"""Train one recipe with every method at one budget of keys, and tell the loss on text by the tokens trained on.

    python -m sparsetrain.recipes.evidence.tokens text-long --seed 2
    python -m sparsetrain.recipes.evidence.tokens text-long --only full --only power train.steps=400

Two numbers by step: perplexity, and perplexity on key tokens (LongPPL, 2410.23771), those that the base with full
attention finds likely with the long context and not with a short one: the same for all methods. Runs are those of
:mod:`~sparsetrain.recipes.evidence.run`, and are not repeated.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from sparsetrain.recipes.evidence.relay import at_one_budget, the_power
from sparsetrain.recipes.evidence.run import attention_setting, choose, opened, train

from sparsetrain.cli.entry import run_script
from sparsetrain.errors import TrainingError
from sparsetrain.evaluation.report import read_results
from sparsetrain.evaluation.tasks.key_tokens import KeyTokensResult
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult
from sparsetrain.recipe import Recipe

PERPLEXITY, KEY_TOKENS = "perplexity", "key tokens"
SINKS = 4
"""Tokens, of methods whose sinks are no blocks."""
SCORERS = "train.new_modules_lr=1.0e-2"
"""SparseK's start from a guess."""
ORIGINAL, BEFORE, AFTER = "full attention, before", "before", "after"


@dataclass(frozen=True)
class Curve:
    """What one run measured, by the tokens trained on."""

    method: str
    seed: int
    original: dict[str, float]
    """Of the base with full attention."""
    points: dict[int, dict[str, float]]
    """With the method, by tokens trained on; 0 is before training."""
    key_tokens: str
    """Equal for equal key tokens."""


def methods(recipe: Recipe) -> dict[str, list[str]]:
    """The settings of each method, all with as many keys as the recipe's power has in its rows.

    Raises:
        typer.BadParameter: the recipe's attention is not power, or its rows are no whole number of blocks.
    """
    power, length = the_power(recipe), recipe.sequence.length
    if length % power.block:
        raise typer.BadParameter(
            f"sequence.length={length} is no whole number of blocks of attention.block={power.block}"
        )
    blocks = length // power.block
    keys = power.pattern().max_key_blocks(blocks) * power.block
    sections: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        **at_one_budget(power, blocks),
        **chosen_keys(keys),
    }
    settings = {name: [attention_setting(section)] for name, section in sections.items()}
    settings["sparsek"].append(SCORERS)
    return settings


def chosen_keys(keys: int) -> dict[str, dict[str, Any]]:
    """The attention sections of the methods that choose keys, so many at most."""
    half = keys // 2
    return {
        "sparsek": {
            "method": "sparsek",
            "topk": half,
            "window": keys - half - SINKS,
            "sinks": SINKS,
            "init": "attention",
        },
        # Beside its budget, one token of every few reads everything, to choose.
        "recycled": {
            "method": "recycled",
            "every": [8, 16, 32],
            "keep": keys - keys // 8 - SINKS,
            "recent": keys // 8,
            "sinks": SINKS,
            "text_prefix": "uniform",
        },
    }


def curve(folder: Path, method: str, seed: int, tokens: int) -> Curve:
    """What the finished run of a folder measured.

    Args:
        tokens: of a step.
    """
    results = read_results(folder)
    steps = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    points, original = {}, {}
    for label, result in results.items():
        found: dict[str, float] = {}
        for task in result.tasks.values():
            if isinstance(task, PerplexityResult):
                found[PERPLEXITY] = task.perplexity[max(task.perplexity)]
            elif isinstance(task, KeyTokensResult):
                found[KEY_TOKENS] = task.key[max(task.key)].perplexity()
                digest = task.digest
        moment = label.rpartition(", ")[2]
        at = re.fullmatch(r"step ([\d,]+)", moment)
        if label == ORIGINAL:
            original = found
        else:
            step = int(at[1].replace(",", "")) if at else {BEFORE: 0, AFTER: steps}[moment]
            points[step * tokens] = found
    return Curve(method, seed, original or points[0], dict(sorted(points.items())), digest)


def table(curves: list[Curve], name: str) -> str:
    """Markdown: a row for each method, and a column for each number of tokens, a cell having every seed."""
    columns = [f"{tokens / 1e6:.1f}M" for tokens in curves[0].points]
    lines = [f"| {name} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for method in dict.fromkeys(each.method for each in curves):
        of = sorted((each for each in curves if each.method == method), key=lambda each: each.seed)
        cells = [" / ".join(f"{each.points[tokens][name]:.2f}" for each in of) for tokens in of[0].points]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    recipe: Annotated[str, typer.Argument(help="text-long, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each method; 2 by default.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Compare methods with one budget of keys by the loss on text against tokens trained on."""
    file, loaded = opened(recipe, settings)
    chosen = choose(methods(loaded), only)
    out = out or Path("runs/evidence") / file.stem
    out.mkdir(parents=True, exist_ok=True)
    tokens = loaded.sequence.length * loaded.train.micro_batch

    def run(case: tuple[int, str]) -> Curve:
        number, name = case
        folder = out / f"{name.replace(', ', '-')}-{number}"
        train(file, name, number, [*(settings or []), *chosen[name]], folder)
        found = curve(folder, name, number, tokens)
        print(f"{name}, seed {number}: {found.points}", flush=True)
        return found

    with ThreadPoolExecutor(parallel) as pool:
        curves = list(pool.map(run, product(seed or [2], chosen)))
    if len({each.key_tokens for each in curves}) > 1:
        raise TrainingError(f"the runs in {out} have other key tokens than one another; give a new --out")
    tables = "\n".join(table(curves, name) for name in (PERPLEXITY, KEY_TOKENS))
    (out / "table.json").write_text(json.dumps([asdict(each) for each in curves], indent=1) + "\n")
    (out / "table.md").write_text(tables)
    print(tables)


if __name__ == "__main__":
    run_script(main)
