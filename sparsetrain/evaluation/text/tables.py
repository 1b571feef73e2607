"""Tables of losses: by position, and paired with those of the first result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from sparsetrain.evaluation.base import Rows
from sparsetrain.evaluation.text.losses import Losses

R = TypeVar("R")

DIFFERENCE = "Difference from {} in nats a token, ± standard error, paired over stretches of the text"
"""The title of :func:`difference_rows`, for the label of the first result."""


def difference_cell(mine: Losses | None, first: Losses | None) -> str:
    """``+0.0123 ± 0.0004``; ``-`` where there is nothing to compare."""
    if mine is None or first is None or not mine.comparable(first):
        return "-"
    mean, error = mine.difference(first)
    shown = "0.0000" if abs(mean) < 0.00005 else f"{mean:+.4f}"  # not -0.0000
    return shown if math.isnan(error) else f"{shown} ± {error:.4f}"


def difference_rows(results: Mapping[str, R], losses: Mapping[str, Callable[[R], Losses | None]]) -> Rows:
    """A row for each result but the first: its losses minus those of the first.

    Args:
        losses: what is compared, by the header of its column.
    """
    first, *others = results
    rows = [["", *losses]]
    for label in others:
        pairs = ((get(results[label]), get(results[first])) for get in losses.values())
        rows.append([label, *(difference_cell(mine, theirs) for mine, theirs in pairs)])
    return rows


def significant(value: float) -> str:
    """A perplexity with four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def columns_of(results: Sequence[R], keys: Callable[[R], Sequence[int]]) -> list[int]:
    """All lengths of results, ascending."""
    return sorted({key for result in results for key in keys(result)})
