"""Fill the table: every implementation at every length, checked and timed; what fails becomes a reason in its cell."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsetrain.bench.attention_opponents import OPPONENTS, Opponent
from sparsetrain.bench.check import TOLERANCE, Answer, Check, answer, oracle, relative_errors
from sparsetrain.bench.power import PowerBench
from sparsetrain.bench.problem import Problem, Tensors
from sparsetrain.bench.report import Report, Row, rank
from sparsetrain.bench.timing import MIB, explain, extra_bytes, matmul_tflops, median_ms, release

OURS = OPPONENTS[0]
ORACLE = "fp32 oracle"

Log = Callable[[str], None]


def fill(report: Report, bench: PowerBench, log: Log) -> Iterator[Report]:
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
        rows, checks = measure_length(bench, length, log)
        report.checks += checks
        relevant = [check for check in report.checks if check.against == ORACLE or check.length == length]
        for row in rows:
            row.complete(report.ceiling_tflops)
            row.check = _verdict(row.name, relevant) if bench.check else "off"
        rank(rows)
        report.rows += rows
        yield report


def check_against_oracle(bench: PowerBench, log: Log) -> list[Check]:
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


def measure_length(bench: PowerBench, length: int, log: Log) -> tuple[list[Row], list[Check]]:
    """All implementations at one length, timed in shuffled order and returned in that of ``bench``."""
    problem = bench.problem(length)
    order = list(bench.opponents)
    random.Random(length).shuffle(order)
    rows: dict[str, Row] = {}
    checks: list[Check] = []
    try:
        tensors = problem.tensors()
    except Exception as error:
        return [Row.of(each, problem, reason=explain(error)) for each in bench.opponents], []
    ours = None
    if bench.check and any(each.sparse and each is not OURS for each in order):
        try:
            ours = answer(OURS.prepare(problem, tensors), tensors)
        except Exception as error:
            log(f"{length:>9,}  ours cannot be compared with the others: {explain(error)}")
    for opponent in order:
        rows[opponent.name], check = _measure(opponent, bench, problem, tensors, ours)
        checks += [check] if check else []
        release()
        log(f"{length:>9,}  {opponent.name:10}  {rows[opponent.name].summary}")
        if check:
            log(f"{length:>9,}  {opponent.name:10}  check: {check.summary}")
    if checks and not any(check.passed for check in checks):
        # Nobody agrees with ours: it is as likely ours that is wrong.
        best = min(checks, key=lambda check: max(check.errors, default=float("inf")))
        checks.append(Check(OURS.name, length, "all others", best.tolerance, best.errors, best.reason))
    return [rows[each.name] for each in bench.opponents], checks


def _measure(
    opponent: Opponent, bench: PowerBench, problem: Problem, tensors: Tensors, ours: Answer | None
) -> tuple[Row, Check | None]:
    """One implementation at one length. What was measured before a failure is kept."""
    row, check = Row.of(opponent, problem), None
    try:
        prepared = opponent.prepare(problem, tensors)
        row.note, row.mask_ms, row.mask_mib = prepared.note, prepared.mask_ms, _mib(prepared.mask_bytes)
        inputs, upstream = prepared.leaves(tensors)

        def forward() -> Tensor:
            return prepared.attend(*inputs)

        def both() -> Tensor:
            out = forward()
            torch.autograd.backward(out, upstream)
            return out

        device, budget_ms = bench.device, bench.budget_ms
        row.forward_ms = median_ms(forward, device=device, budget_ms=budget_ms)
        if ours is not None and opponent.sparse and opponent is not OURS:
            errors = relative_errors(answer(prepared, tensors), ours)
            check = Check(opponent.name, problem.length, "ours", TOLERANCE[bench.dtype], errors)
        row.both_ms = median_ms(both, device=device, budget_ms=budget_ms, gradients=inputs)
        row.extra_mib = _mib(extra_bytes(both, inputs, device))
    except Exception as error:
        row.reason = explain(error)
    return row, check


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def _verdict(name: str, checks: list[Check]) -> str:
    """``passed``, ``failed``, or ``unchecked`` where a comparison could not be made."""
    mine = [check for check in checks if check.name == name]
    if any(check.errors and not check.passed for check in mine):
        return "failed"
    return "passed" if all(check.passed for check in mine) else "unchecked"
