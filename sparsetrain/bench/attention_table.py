"""Fill the table: every implementation at every length, checked and timed; what fails becomes a reason in its cell."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsetrain.bench.attention_bench import AttentionBench
from sparsetrain.bench.attention_opponents import Opponent, P, Prepared
from sparsetrain.bench.check import TOLERANCE, Answer, Check, answer, oracle, relative_errors
from sparsetrain.bench.problem import BACKWARD_WORK, Tensors
from sparsetrain.bench.report import Report, Row, rank
from sparsetrain.bench.timing import MIB, explain, extra_bytes, matmul_tflops, median_ms, once_ms, release

ORACLE = "fp32 oracle"
PATIENCE_MS = 2000.0
"""A forward and backward pass that takes longer even at the rate of a matrix product is measured once."""

Log = Callable[[str], None]


def fill(report: Report, bench: AttentionBench[P], log: Log) -> Iterator[Report]:
    """Measure into ``report``, and yield it after every length."""
    size = 8192 if bench.device.type == "cuda" else 1024
    try:
        report.ceiling_tflops = matmul_tflops(bench.dtype, bench.device, size, bench.budget_ms)
        log(f"matrix product of {size}: {report.ceiling_tflops:.3g} TFLOP/s")
    except Exception as error:
        log(f"matrix product of {size}: {explain(error)}")
    if bench.check:
        report.checks += check_against_oracle(bench, log)
    for length in bench.lengths:
        rows, checks = measure_length(bench, length, report.ceiling_tflops, log)
        report.checks += checks
        relevant = [check for check in report.checks if check.against == ORACLE or check.length == length]
        for row in rows:
            row.complete(report.ceiling_tflops)
            row.check = _verdict(row.name, relevant) if bench.check else "off"
        rank(rows)
        report.rows += rows
        yield report


def check_against_oracle(bench: AttentionBench[P], log: Log) -> list[Check]:
    """Every implementation against the definition, at a short length."""
    problem = bench.check_problem()
    checks = []
    for opponent in bench.opponents:
        errors: tuple[float, ...] = ()
        reason = ""
        try:
            tensors = problem.tensors()
            want = oracle(problem, tensors, opponent.sparse)
            errors = relative_errors(answer(opponent.prepare(problem, tensors), tensors), want)
        except Exception as error:
            reason = explain(error)
        checks.append(Check(opponent.name, problem.length, ORACLE, TOLERANCE[bench.dtype], errors, reason))
        log(f"{problem.length:>9,}  {opponent.name:10}  check: {checks[-1].summary}")
        release()
    return checks


def measure_length(
    bench: AttentionBench[P], length: int, ceiling_tflops: float | None, log: Log
) -> tuple[list[Row], list[Check]]:
    """All implementations at one length, returned in the order of ``bench``.

    Timed in shuffled order, but what takes so long that it is measured once comes last: others do not lose their turn
    where it ends in a fault of the GPU.
    """
    problem = bench.problem(length)
    order = list(bench.opponents)
    random.Random(length).shuffle(order)
    once = {each.name: _takes_long(problem.flops(each.sparse), ceiling_tflops) for each in order}
    order.sort(key=lambda each: once[each.name])
    rows: dict[str, Row] = {}
    checks: list[Check] = []
    try:
        tensors = problem.tensors()
    except Exception as error:
        return [Row.of(each, problem, reason=explain(error)) for each in bench.opponents], []
    ours = None
    if bench.check and any(each.sparse and each is not bench.ours for each in order):
        try:
            ours = answer(bench.ours.prepare(problem, tensors), tensors)
        except Exception as error:
            log(f"{length:>9,}  ours cannot be compared with the others: {explain(error)}")
    for opponent in order:
        rows[opponent.name], check = _measure(opponent, bench, problem, tensors, ours, once[opponent.name])
        checks += [check] if check else []
        release()
        log(f"{length:>9,}  {opponent.name:10}  {rows[opponent.name].summary}")
        if check:
            log(f"{length:>9,}  {opponent.name:10}  check: {check.summary}")
    if checks and not any(check.passed for check in checks):
        # Nobody agrees with ours: it is as likely ours that is wrong.
        best = min(checks, key=lambda check: max(check.errors, default=float("inf")))
        checks.append(Check(bench.ours.name, length, "all others", best.tolerance, best.errors, best.reason))
    return [rows[each.name] for each in bench.opponents], checks


def _measure(
    opponent: Opponent[P],
    bench: AttentionBench[P],
    problem: P,
    tensors: Tensors,
    ours: Answer | None,
    once: bool,
) -> tuple[Row, Check | None]:
    """One implementation at one length. What was measured before a failure is kept."""
    row, check = Row.of(opponent, problem), None
    try:
        if once:
            short = bench.check_problem()
            answer(opponent.prepare(short, short.tensors()), short.tensors())  # compiles
        prepared = opponent.prepare(problem, tensors)
        row.note, row.mask_ms, row.mask_mib = prepared.note, prepared.mask_ms, _mib(prepared.mask_bytes)
        if once:
            row.note = "; ".join(filter(None, [row.note, "one call measured"]))
            _time_once(row, prepared, tensors, bench)
            return row, None
        inputs, upstream = prepared.leaves(tensors)

        def forward() -> Tensor:
            return prepared.attend(*inputs)

        def both() -> Tensor:
            out = forward()
            torch.autograd.backward(out, upstream)
            return out

        device, budget_ms = bench.device, bench.budget_ms
        row.forward_ms = median_ms(forward, device=device, budget_ms=budget_ms)
        if ours is not None and opponent.sparse and opponent is not bench.ours:
            errors = relative_errors(answer(prepared, tensors), ours)
            check = Check(opponent.name, problem.length, "ours", TOLERANCE[bench.dtype], errors)
        row.both_ms = median_ms(both, device=device, budget_ms=budget_ms, gradients=inputs)
        row.extra_mib = _mib(extra_bytes(both, inputs, device))
        if prepared.select is not None:
            row.selection_ms = _selection_ms(prepared.select, inputs[-1], bench)
    except Exception as error:
        row.reason = explain(error)
    return row, check


def _takes_long(forward_flops: float, ceiling_tflops: float | None) -> bool:
    return ceiling_tflops is not None and (1 + BACKWARD_WORK) * forward_flops / ceiling_tflops / 1e9 > PATIENCE_MS


def _time_once(row: Row, prepared: Prepared, tensors: Tensors, bench: AttentionBench[P]) -> None:
    """Times and memory of one and the same call."""
    inputs, upstream = prepared.leaves(tensors)

    def both() -> Tensor:
        out, row.forward_ms = once_ms(lambda: prepared.attend(*inputs), bench.device)
        _, backward_ms = once_ms(lambda: torch.autograd.backward(out, upstream), bench.device)
        row.both_ms = row.forward_ms + backward_ms
        return out

    row.extra_mib = _mib(extra_bytes(both, inputs, bench.device))


def _selection_ms(select: Callable[[Tensor], Tensor], scores: Tensor, bench: AttentionBench[P]) -> float:
    """The selection and its gradient, without the attention between them."""
    gradient = torch.ones_like(scores)

    def both() -> None:
        torch.autograd.backward(select(scores), gradient)

    return median_ms(both, device=bench.device, budget_ms=bench.budget_ms, gradients=[scores])


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def _verdict(name: str, checks: list[Check]) -> str:
    """``passed``, ``failed``, or ``unchecked`` where a comparison could not be made."""
    mine = [check for check in checks if check.name == name]
    if any(check.errors and not check.passed for check in mine):
        return "failed"
    return "passed" if all(check.passed for check in mine) else "unchecked"
