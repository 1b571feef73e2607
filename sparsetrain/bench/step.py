"""The training steps of a recipe on random weights: time, tokens a second and peak memory, beside other ways."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console, JustifyMethod
from rich.table import Table

from sparsetrain.bench.options import check_output, parse_lengths
from sparsetrain.bench.report import machine
from sparsetrain.bench.step_loops import WAYS
from sparsetrain.bench.timing import Unavailable, explain, release
from sparsetrain.errors import BenchError, SparsetrainError
from sparsetrain.recipe import Recipe, batch_shape, load_recipe
from sparsetrain.tables import print_tables
from sparsetrain.training.engine import World, init_world

GIB = 2**30
LONG_SECONDS = 20.0
"""A step longer than this is timed once; the spread is far below its length."""


@dataclass
class StepRow:
    """One way at one length: forward, backward and optimizer of one step."""

    length: int
    way: str
    attention: str
    seconds: float | None = None
    """Median of the timed steps."""
    tokens_per_second: float | None = None
    """Over all ranks."""
    peak_gib: float | None = None
    """All memory that torch had allocated at the peak of the timed steps, on the rank where it was highest."""
    reason: str = ""


class _Enough(Exception):
    """Stops a loop whose step was long enough to be timed once."""


class _Watch:
    """Times of the steps behind the first ones, which settle and never count, however long they take: kernels are
    compiled, memory is allocated. Every rank calls it, and all of them stop at the same step."""

    def __init__(self, world: World, settling: int) -> None:
        self.world, self.settling = world, settling
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        seconds = self.world.largest(seconds)
        if self.settling:
            self.settling -= 1
            if self.world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.world.device)
            return
        self.seconds.append(seconds)
        if seconds > LONG_SECONDS:
            raise _Enough


def run_step(
    recipe: str, settings: Sequence[str], *, ways: str, lengths: str | None, repeats: int, output: Path | None
) -> list[StepRow]:
    """Measure, print, and write to ``output`` where given.

    Raises:
        BenchError: an option cannot be measured or written to, or one of several ranks failed.
        SparsetrainError: the recipe is wrong.
    """
    names = ways.split(",")
    if unknown := [name for name in names if name not in WAYS]:
        raise BenchError(f"--ways {unknown[0]}: there is no such way; choose from {', '.join(WAYS)}")
    given = [f"sequence.length={length}" for length in parse_lengths(lengths)] if lengths else [""]
    recipes = [load_recipe(recipe, [*settings, *([one] if one else [])]).recipe for one in given]
    if (bits := recipes[0].base_bits) != "none":
        raise BenchError(
            f"lora.quantize_base={bits}: steps are measured on random weights in the model's dtype; set it to none"
        )
    check_output(output)
    world = init_world(recipes[0].deepspeed.timeout)
    if world.main and world.device.type == "cpu":
        print("No GPU: these are CPU timings, and no memory is counted.")
    rows = []
    for row in _measure(recipes, names, repeats, world):
        rows.append(row)
        if world.main:
            told = row.reason or f"{row.seconds:.4g} s"
            print(f"{row.length:>9,}  {row.way:8} {row.attention:8}  {told}", file=sys.stderr, flush=True)
            if output is not None:
                _write(rows, recipes[0], world, output)
    if world.main:
        print_tables(Console(highlight=False), _table(rows, recipes[0], world))
    return rows


def _measure(recipes: list[Recipe], names: list[str], repeats: int, world: World) -> Iterator[StepRow]:
    for recipe in recipes:
        settling = settling_steps(recipe)
        plan = batch_shape(recipe, world.size).with_steps(settling + repeats)
        for name in names:
            attention = WAYS[name].attention or recipe.attention.method
            row, watch = StepRow(recipe.sequence.length, name, attention), _Watch(world, settling)
            try:
                WAYS[name].run(recipe, plan, world, watch)
            except _Enough:
                pass
            except (Unavailable, SparsetrainError) as error:  # on all ranks alike
                row.reason = explain(error)
            except Exception as error:
                row.reason = explain(error)
                if world.size > 1:
                    # The others may be waiting in a collective; the launcher ends them once this rank has left.
                    raise BenchError(f"{name} at {row.length:,} tokens, rank {world.rank}: {row.reason}") from error
            if watch.seconds and not row.reason:
                row.seconds = median(watch.seconds)
                row.tokens_per_second = plan.tokens_per_step / row.seconds
                row.peak_gib = _peak(world)
            release()
            yield row


def settling_steps(recipe: Recipe) -> int:
    """First steps that are not timed. DeepSpeed's ZeRO-3 records in the first what is read when, and works out in the
    second what to keep: seconds for a model of many small modules, once."""
    return 2 if recipe.deepspeed.stage == 3 else 1


def _peak(world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    return world.largest(torch.cuda.max_memory_allocated(world.device) / GIB)


def _table(rows: list[StepRow], recipe: Recipe, world: World) -> Table:
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    table = Table(title=f"A training step of {recipe.name}, random weights, {ranks}", box=None)
    for column in ("tokens", "way", "attention", "seconds", "tokens/s", "peak GiB", ""):
        justify: JustifyMethod = "left" if column in ("way", "attention", "") else "right"
        table.add_column(column, justify=justify, no_wrap=column != "")
    for row in rows:
        numbers = (("{:,.3f}", row.seconds), ("{:,.0f}", row.tokens_per_second), ("{:,.1f}", row.peak_gib))
        cells = ["-" if number is None else form.format(number) for form, number in numbers]
        table.add_row(f"{row.length:,}", row.way, row.attention, *cells, row.reason)
    return table


def _write(rows: list[StepRow], recipe: Recipe, world: World, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "command": shlex.join(["sparsetrain", *sys.argv[1:]]),
        "recipe": recipe.model_dump(mode="json"),
        "ranks": world.size,
        "machine": machine(),
    }
    content = {**facts, "rows": [asdict(row) for row in rows]}
    (output / "step.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with (output / "step.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(StepRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
