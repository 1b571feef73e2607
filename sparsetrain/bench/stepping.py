"""The training steps of a recipe on random weights: time, tokens a second and peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from rich.text import Text

from sparsetrain.bench.case import Case, Log, Pair
from sparsetrain.bench.contenders.steps import Way
from sparsetrain.bench.measure import Unavailable, explain
from sparsetrain.bench.recorded import Busy, Recorder
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
    host_gib: float | None = column("host GiB", optional=True, form=formatted("{:,.1f}"))
    """Memory of a rank's process on the host, libraries included, on the rank where it was highest."""
    waiting: float | None = column("waiting", optional=True, form=formatted("{:.1%}"))
    """Share of a timed step in which collectives run and nothing is computed, on the rank where it was highest."""
    exchange_seconds: float | None = column("exchange s", optional=True)
    """Seconds of it in which kernels of all-to-all run, on the rank where it was highest: one that is ahead waits."""
    copy_seconds: float | None = column("host copies s", optional=True)
    """Seconds of it in which tensors are copied from or to the host, beneath computation or not."""
    idle: float | None = column("idle", optional=True, form=formatted("{:.1%}"))
    """Share of it in which neither computation nor a collective runs."""
    loss: float | None = None
    """Loss of the first step, before any update: in nats a token."""
    grad_norm: float | None = None
    """Norm of its gradient."""

    @property
    def summary(self) -> str:
        """The attention and the time."""
        if self.reason:
            return f"{self.attention:8}  {self.reason}"
        first = "" if self.loss is None else f"; first step: loss {self.loss:.6f}, gradient norm {self.grad_norm:.6g}"
        return f"{self.attention:8}  {self.seconds:.4g} s{first}"

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
    compiled, memory is allocated. Every rank calls it, and all of them stop at the same step.

    The first of the timed steps is recorded as well: what the device computed, and what it waited for.
    """

    def __init__(self, world: World, settling: int) -> None:
        self.world, self.settling = world, settling
        self.seconds: list[float] = []
        self.first: tuple[float, float] | None = None
        """Loss and norm of the gradient in the first step of all."""
        self.busy: Busy | None = None
        self.host = 0
        """Bytes of host memory that this process holds between timed steps."""
        self._recorder = Recorder(world.device)

    def __call__(self, seconds: float, loss: float | None = None, grad_norm: float | None = None) -> None:
        seconds = self.world.largest(seconds)
        if self.first is None and loss is not None and grad_norm is not None:
            self.first = loss, grad_norm
        if self.settling:
            self.settling -= 1
            if self.world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.world.device)
            if not self.settling:
                self._recorder.start()
            return
        self.busy = self._recorder.stop() or self.busy
        self.host = psutil.Process().memory_info().rss
        self.seconds.append(seconds)
        if seconds > LONG_SECONDS:
            raise Enough

    def close(self) -> None:
        """Stop recording, also behind a failure."""
        self._recorder.stop()

    def fill(self, row: StepRow) -> None:
        """What is known besides the times; every rank calls it."""
        if self.first is not None:
            row.loss, row.grad_norm = self.first
        if self.world.device.type != "cuda":
            return
        row.peak_gib = self.world.largest(torch.cuda.max_memory_allocated(self.world.device) / GIB)
        row.host_gib = self.world.largest(self.host / GIB)
        if self.busy is not None:
            row.waiting = self.world.largest(self.busy.waiting / self.busy.total)
            row.exchange_seconds = self.world.largest(self.busy.exchange)
            row.copy_seconds = self.world.largest(self.busy.copying)
            row.idle = self.world.largest(self.busy.idle / self.busy.total)


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
        longest = self.options.full_up_to
        if longest is not None and way.attention == "full" and row.length > longest:
            raise Unavailable(f"rows of more than --full-up-to {longest} tokens are left out")
        settling = settling_steps(recipe)
        plan = batch_shape(recipe, self.world.size).with_steps(settling + self.options.repeats)
        times = StepTimes(self.world, settling)
        with own_linear(), suppress(Enough), closing(times):
            way.run(recipe, plan, self.world, times)
        if times.seconds:
            row.seconds = median(times.seconds)
            row.tokens_per_second = plan.tokens_per_step / row.seconds
            times.fill(row)

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
