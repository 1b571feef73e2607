"""The training steps of a recipe on random weights: time, tokens a second and peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.text import Text

from sparsetrain.bench.case import Case, Log, Pair
from sparsetrain.bench.contenders.steps import Way
from sparsetrain.bench.measure import Unavailable, explain
from sparsetrain.bench.table import Report, Row, column, formatted
from sparsetrain.errors import BenchError, SparsetrainError
from sparsetrain.recipe import Recipe, batch_shape
from sparsetrain.training.distributed.engine import own_linear
from sparsetrain.world import World

GIB = 2**30
LONG_SECONDS = 20.0
"""A step longer than this is timed once; the spread is far below its length."""


@dataclass(kw_only=True)
class StepRow(Row):
    """One way at one length: forward, backward and optimizer of one step."""

    way: str
    attention: str
    seconds: float | None = column("seconds", form=formatted("{:,.3f}"))
    """Median of the timed steps."""
    tokens_per_second: float | None = column("tokens/s", form=formatted("{:,.0f}"))
    """Over all ranks."""
    peak_gib: float | None = column("peak GiB", form=formatted("{:,.1f}"))
    """All memory that torch had allocated at the peak of the timed steps, on the rank where it was highest."""

    @property
    def summary(self) -> str:
        """The attention and the time."""
        return f"{self.attention:8}  {self.reason or f'{self.seconds:.4g} s'}"

    @property
    def remark(self) -> str:
        """Nothing: the reason is in the row."""
        return ""

    def ends(self) -> tuple[dict[str, Text], dict[str, Text]]:
        """Length and way, and the reason."""
        tokens = Text(f"{self.length:,}", justify="right")
        return {"tokens": tokens, "way": Text(self.way), "attention": Text(self.attention)}, {"": Text(self.reason)}

    @staticmethod
    def tables(report: Report) -> Iterable[tuple[str, Sequence[Row]]]:
        """One, of all lengths."""
        ranks = f"{report.facts['ranks']} rank{'s' if report.facts['ranks'] > 1 else ''}"
        yield f"A training step of {report.facts['recipe']['name']}, random weights, {ranks}", report.rows


class Enough(Exception):
    """Stops a loop whose step was long enough to be timed once."""


class StepTimes:
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
            raise Enough


@dataclass(frozen=True)
class StepCase(Case):
    """A recipe at several lengths, in several ways, on one rank or on several."""

    recipes: dict[int, Recipe]
    """Recipes by length."""
    world: World

    @property
    def lengths(self) -> Sequence[int]:
        """The lengths of the recipes."""
        return list(self.recipes)

    @property
    def main(self) -> bool:
        """Rank 0."""
        return self.world.main

    @property
    def on_a_cpu(self) -> str:
        """The note for CPUs, where the same code runs."""
        return "No GPU: these are CPU timings, and no memory is counted."

    def begin(self, report: Report, log: Log) -> None:
        """Record the recipe and the number of ranks."""
        report.facts |= {"recipe": next(iter(self.recipes.values())).model_dump(mode="json"), "ranks": self.world.size}

    def order(self, pairs: Sequence[Pair], length: int, report: Report) -> Sequence[Pair]:
        """In the requested order."""
        return pairs

    def row(self, way: Way, length: int) -> StepRow:
        """An empty row."""
        attention = way.attention or self.recipes[length].attention.method
        return StepRow(length=length, name=way.name, way=way.name, attention=attention)

    def inputs(self, length: int, report: Report, log: Log) -> Recipe:
        """The recipe of that length."""
        return self.recipes[length]

    def measure(self, way: Way, recipe: Recipe, row: Any, report: Report) -> None:
        """Take the steps that settle and those that are timed."""
        settling = settling_steps(recipe)
        plan = batch_shape(recipe, self.world.size).with_steps(settling + self.options.repeats)
        times = StepTimes(self.world, settling)
        with own_linear(), suppress(Enough):
            way.run(recipe, plan, self.world, times)
        if times.seconds:
            row.seconds = median(times.seconds)
            row.tokens_per_second = plan.tokens_per_step / row.seconds
            if self.device.type == "cuda":
                row.peak_gib = self.world.largest(torch.cuda.max_memory_allocated(self.world.device) / GIB)

    def failed(self, way: Way, row: Row, error: Exception) -> None:
        """A fault of one rank among several ends the benchmark: the others may be waiting in a collective, and the
        launcher ends them once this rank has left."""
        row.reason = explain(error)
        if self.world.size > 1 and not isinstance(error, Unavailable | SparsetrainError):
            raise BenchError(f"{way.name} at {row.length:,} tokens, rank {self.world.rank}: {row.reason}") from error


def settling_steps(recipe: Recipe) -> int:
    """First steps that are not timed. DeepSpeed's ZeRO-3 records in the first what is read when, and works out in the
    second what to keep: seconds for a model of many small modules, once."""
    return 2 if recipe.deepspeed.stage == 3 else 1
