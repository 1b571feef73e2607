"""Benchmarks of attention in training (forward and backward): check, time and report implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from rich.text import Text
from torch import Tensor

from sparsetrain.bench.case import Case, Log, Pair
from sparsetrain.bench.check import TOLERANCE, Answer, Check, answer, oracle, relative_errors
from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.measure import explain, extra_mib, matmul_tflops, once_ms, release, shuffled
from sparsetrain.bench.problem import CausalProblem, Tensors
from sparsetrain.bench.table import ComparedRow, Panel, Report, Row, column

MAX_CHECKED = 8192
"""Number of tokens for the comparison with the reference, which builds the full mask."""
ORACLE = "fp32 oracle"
PATIENCE_MS = 2000.0
"""A forward and backward pass that takes longer even at the rate of a matrix product is measured once."""
BACKWARD_WORK = 2.5
"""Matrix products of a backward pass over those of a forward pass: five to two."""
CEILING = ("ceiling_tflops", "matrix product")
RATE = "TFLOP/s on visible pairs"


@dataclass(kw_only=True)
class AttentionRow(ComparedRow):
    """One implementation at one length."""

    documents: int
    forward_flops: float
    """On the pairs of tokens that this implementation has to compute."""
    forward_ms: float | None = column("fwd ms")
    both_ms: float | None = column("fwd+bwd ms", panel=Panel("Forward and backward", "ms", log=True))
    backward_ms: float | None = column("bwd ms")
    forward_tflops: float | None = column(
        "TFLOP/s fwd", share="forward_share", panel=Panel("Rate of the forward pass", RATE, limit=CEILING)
    )
    backward_tflops: float | None = column(
        "TFLOP/s bwd", share="backward_share", panel=Panel("Rate of the backward pass", RATE, limit=CEILING)
    )
    selection_ms: float | None = column("select ms", share="selection_share", optional=True)
    """Time of the selection of keys and its gradient, a part of ``both_ms`` that is timed separately."""
    full_rows_ms: float | None = column("full rows ms", optional=True)
    """Time of the rows that attend fully, forward and backward."""
    listed_ms: float | None = column("lists ms", optional=True)
    """Time of attention over lists of keys, forward and backward."""
    attention_tflops: float | None = column("TFLOP/s rest", optional=True)
    """Forward and backward without the selection."""
    extra_mib: float | None = column("memory MiB", optional=True)
    """Peak memory of forward and backward beyond inputs, output and gradients."""
    mask_ms: float | None = column("mask ms", optional=True)
    mask_mib: float | None = column("mask MiB", optional=True)
    """Peak memory of building the mask."""
    forward_ratio: float | None = column("x fwd", optional=True)
    """This time over ours: above 1, ours is faster."""
    both_ratio: float | None = column("x fwd+bwd", optional=True)
    forward_share: float | None = None
    """Fraction of the measured FLOP/s of a matrix product."""
    backward_share: float | None = None
    selection_share: float | None = None
    """The selection as a fraction of ``both_ms``."""
    rank: int | None = None
    """Rank by forward plus backward time at this length, without rows whose check failed."""

    @property
    def order_ms(self) -> float | None:
        """Time of forward plus backward."""
        return self.both_ms

    def complete(self, ceiling_tflops: float | None) -> None:
        """Work out what follows from the times."""
        if self.forward_ms is None:
            return
        self.forward_tflops = self.forward_flops / self.forward_ms / 1e9
        # A machine that does something else meanwhile can make the difference of two medians negative.
        if self.both_ms is not None and self.both_ms > self.forward_ms:
            self.backward_ms = self.both_ms - self.forward_ms
            self.backward_tflops = BACKWARD_WORK * self.forward_flops / self.backward_ms / 1e9
        if self.both_ms is not None and self.selection_ms is not None:
            self.selection_share = self.selection_ms / self.both_ms
            if self.both_ms > self.selection_ms:
                work = (1 + BACKWARD_WORK) * self.forward_flops
                self.attention_tflops = work / (self.both_ms - self.selection_ms) / 1e9
        if ceiling_tflops:
            self.forward_share = self.forward_tflops / ceiling_tflops
            self.backward_share = None if self.backward_tflops is None else self.backward_tflops / ceiling_tflops

    @property
    def summary(self) -> str:
        """The times."""
        if self.forward_ms is None or self.both_ms is None:
            return self.reason
        return f"forward {self.forward_ms:.4g} ms, forward + backward {self.both_ms:.4g} ms"

    def ends(self) -> tuple[dict[str, Text], dict[str, Text]]:
        """The rank first."""
        first, last = super().ends()
        return {" ": Text("" if self.rank is None else str(self.rank)), **first}, last

    @staticmethod
    def tables(report: Report) -> Iterable[tuple[str, Sequence[Row]]]:
        """With the number of documents in the title."""
        for title, rows in Row.tables(report):
            documents = rows[0].documents  # type: ignore[attr-defined]
            yield f"{title}, {documents} documents" if documents > 1 else title, rows

    @staticmethod
    def legend(report: Report) -> str:
        """An explanation of the columns."""
        lines = []
        if ceiling := report.facts.get("ceiling_tflops"):
            lines += [
                f"(%): of the {ceiling:.3g} TFLOP/s of a bare matrix product, measured in this run. TFLOP/s count "
                "visible pairs; backward 2.5 times forward.",
                "x: time over ours. Memory beyond inputs, output and gradients; of a mask, at the peak of building it.",
            ]
        if any(row.selection_ms is not None for row in report.rows):
            lines += [
                "select: the selection, forward and backward, timed apart (%: of both passes). TFLOP/s rest: both "
                "passes without it."
            ]
        if any(row.listed_ms is not None for row in report.rows):
            lines += ["full rows, lists: rows that attend fully, and attention over lists, both passes, timed apart."]
        return "\n".join(lines)


def rank(rows: Iterable[AttentionRow]) -> None:
    """Rank the rows of one length and set their times in proportion to ours. A failed check takes a row out of both."""
    sound = [(row, row.forward_ms, row.both_ms) for row in rows if row.forward_ms and row.both_ms]
    sound = sorted((each for each in sound if each[0].check != "failed"), key=lambda each: each[2])
    ours = next((each for each in sound if each[0].name == "ours"), None)
    for place, (row, forward_ms, both_ms) in enumerate(sound, start=1):
        row.rank = place
        if ours is not None:
            row.forward_ratio, row.both_ratio = forward_ms / ours[1], both_ms / ours[2]


Inputs = tuple[CausalProblem, Tensors, Answer | None]
"""The inputs of implementations at one length; the last is our result, if others are compared with it."""


@dataclass(frozen=True)
class AttentionCase(Case):
    """One benchmark of problems of one kind."""

    ours: Contender
    """The implementation with which other sparse ones are compared."""
    problem: Callable[[int], Any]
    """The problem at a number of tokens."""
    check_problem: Callable[[], Any]
    """A short problem that has everything a long one has."""

    not_counted: ClassVar[str] = "GPU memory"

    def begin(self, report: Report, log: Log) -> None:
        """The rate of a matrix product, and every implementation against the definition at a short length."""
        size = 8192 if self.device.type == "cuda" else 1024
        try:
            dtype = self.options.shape()["dtype"]
            ceiling = matmul_tflops(dtype, self.device, size, self.options.budget)
            report.facts["ceiling_tflops"] = ceiling
            log(f"matrix product of {size}: {ceiling:.3g} TFLOP/s")
        except Exception as error:
            log(f"matrix product of {size}: {explain(error)}")
        for contender in self.contenders if self.options.check else ():
            problem = self.check_problem()
            errors: tuple[float, ...] = ()
            reason = ""
            try:
                tensors = problem.tensors()
                want = oracle(problem, tensors, contender.sparse)
                errors = relative_errors(answer(contender.prepare(problem, tensors), tensors), want)
            except Exception as error:
                reason = explain(error)
            check = Check(contender.name, problem.length, ORACLE, TOLERANCE[problem.dtype], errors, reason)
            report.checks.append(check)
            log(f"{problem.length:>9,}  {contender.name:10}  check: {check.summary}")
            release()

    def order(self, pairs: Sequence[Pair], length: int, report: Report) -> Sequence[Pair]:
        """Shuffled, but measurements that are so long that they run only once come last: if one causes a GPU fault, the
        others are done."""
        return sorted(shuffled(pairs, length), key=lambda pair: _once(pair[0], self.problem(length), report))

    def row(self, contender: Contender, length: int) -> AttentionRow:
        """An empty row."""
        problem = self.problem(length)
        documents, flops = len(problem.documents or (length,)), problem.flops(contender.sparse)
        return AttentionRow.of(contender, length, documents=documents, forward_flops=flops)

    def inputs(self, length: int, report: Report, log: Log) -> Inputs:
        """The tensors, and the answer of ours where others are compared with it."""
        problem, ours = self.problem(length), None
        tensors = problem.tensors()
        if self.options.check and any(each.sparse and each is not self.ours for each in self.contenders):
            try:
                ours = answer(self.ours.prepare(problem, tensors), tensors)
            except Exception as error:
                log(f"{length:>9,}  ours cannot be compared with the others: {explain(error)}")
        return problem, tensors, ours

    def measure(self, contender: Contender, given: Inputs, row: AttentionRow, report: Report) -> None:
        """Times, memory, and the comparison with ours."""
        problem, tensors, ours = given
        once = _once(contender, problem, report)
        if once:
            short = self.check_problem()
            answer(contender.prepare(short, short.tensors()), short.tensors())  # compiles
        prepared = contender.prepare(problem, tensors)
        row.note, row.mask_ms, row.mask_mib = prepared.note, prepared.mask_ms, prepared.mask_mib
        inputs, upstream = prepared.leaves(tensors)
        if once:
            row.note = "; ".join(filter(None, [row.note, "one call measured"]))
            _time_once(row, prepared, inputs, upstream, self.device)
            return

        def both() -> Tensor:
            out = prepared.attend(*inputs)
            torch.autograd.backward(out, upstream)
            return out

        row.forward_ms = self.time(lambda: prepared.attend(*inputs))
        if ours is not None and contender.sparse and contender is not self.ours:
            errors = relative_errors(answer(prepared, tensors), ours)
            report.checks.append(Check(contender.name, row.length, "ours", TOLERANCE[problem.dtype], errors))
        row.both_ms = self.time(both, inputs)
        row.extra_mib = extra_mib(both, inputs, self.device)
        if (select := prepared.select) is not None:
            scores = inputs[-1]
            gradient = torch.ones_like(scores)
            row.selection_ms = self.time(lambda: torch.autograd.backward(select(scores), gradient), [scores])
        for name, part in prepared.parts.items():
            setattr(row, name, self.time(partial(part, *inputs), inputs))

    def finish(self, rows: list[AttentionRow], report: Report) -> None:
        """Rates, checks and ranks. If no other implementation agrees with ours, ours may be the wrong one."""
        length = rows[0].length
        checks = [check for check in report.checks if check.length == length and check.against == "ours"]
        if checks and not any(check.passed for check in checks):
            best = min(checks, key=lambda check: max(check.errors, default=float("inf")))
            report.checks.append(Check(self.ours.name, length, "all others", best.tolerance, best.errors, best.reason))
        relevant = [check for check in report.checks if check.against == ORACLE or check.length == length]
        for row in rows:
            row.complete(report.facts.get("ceiling_tflops"))
            row.check = _verdict(row.name, relevant) if self.options.check else "off"
        rank(rows)


def _once(contender: Contender, problem: CausalProblem, report: Report) -> bool:
    ceiling, work = report.facts.get("ceiling_tflops"), (1 + BACKWARD_WORK) * problem.flops(contender.sparse)
    return ceiling is not None and work / ceiling / 1e9 > PATIENCE_MS


def _time_once(
    row: AttentionRow, prepared: Prepared, inputs: list[Tensor], upstream: Tensor, device: torch.device
) -> None:
    """Times and memory of one and the same call."""

    def both() -> Tensor:
        out, row.forward_ms = once_ms(lambda: prepared.attend(*inputs), device)
        _, backward_ms = once_ms(lambda: torch.autograd.backward(out, upstream), device)
        row.both_ms = row.forward_ms + backward_ms
        return out

    row.extra_mib = extra_mib(both, inputs, device)


def _verdict(name: str, checks: list[Check]) -> str:
    mine = [check for check in checks if check.name == name]
    if any(check.errors and not check.passed for check in mine):
        return "failed"
    return "passed" if all(check.passed for check in mine) else "unchecked"
