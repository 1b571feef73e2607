"""Rows beside one another: the numbers of each, with the difference to the first."""

from __future__ import annotations

from collections.abc import Mapping

from sparsetrain.evaluation.base import Rows
from sparsetrain.evaluation.result import EvalResult


def differences(results: Mapping[str, EvalResult]) -> Rows:
    """A row for each metric and a column for each result, with the difference to the first result behind the number.

    Metrics of a part of a part, such as one task of RULER at one length, are left to the tables of the tasks.
    """
    first, *others = results
    metrics = {label: result.metrics() for label, result in results.items()}
    rows = [["", *results]]
    for name in dict.fromkeys(name for each in metrics.values() for name in each):
        if name.count("/") > 2:
            continue
        own = metrics[first].get(name)
        cells = ["-" if own is None else number(own)]
        for other in others:
            value = metrics[other].get(name)
            difference = "" if own is None or value is None else f" ({number(value - own, signed=True)})"
            cells.append("-" if value is None else f"{number(value)}{difference}")
        rows.append([name.removeprefix("eval/"), *cells])
    return rows


def number(value: float, *, signed: bool = False) -> str:
    """A metric with the digits that are worth reading."""
    sign = "+" if signed else ""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"
