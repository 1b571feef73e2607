"""Loss against position: the tokens of a window by how many precede them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.text.losses import Losses

if TYPE_CHECKING:
    import numpy as np

Spacing = Literal["log", "even"]

EVEN = 16
"""Buckets of equal width."""


class Bucket(BaseModel):
    """Losses of tokens by the number of tokens before them in their window."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int
    """The fewest tokens before them."""
    stop: int
    """One more than the most."""
    losses: Losses

    def middle(self) -> float:
        """The mean of the fewest and the most."""
        return (self.first + self.stop - 1) / 2

    def label(self) -> str:
        """``512 to 1,023``."""
        last = self.stop - 1
        return f"{self.first:,}" if last == self.first else f"{self.first:,} to {last:,}"


def edges(length: int, spacing: Spacing) -> list[int]:
    """The edges of buckets of a window: powers of two, or equal parts."""
    if spacing == "log":
        return [*(2**power for power in range(math.ceil(math.log2(length)))), length]
    parts = min(EVEN, length - 1)
    return [max(1, round(length * part / parts)) for part in range(parts + 1)]


def buckets(losses: np.ndarray, context: np.ndarray, length: int, spacing: Spacing) -> list[Bucket]:
    """Losses by position, without empty buckets.

    Args:
        losses: fp64 ``[n]``.
        context: int64 ``[n]``, the tokens before each token in its window.
    """
    found = []
    for first, stop in pairwise(edges(length, spacing)):
        inside = losses[(context >= first) & (context < stop)]
        if len(inside):
            found.append(Bucket(first=first, stop=stop, losses=Losses.of(inside)))
    return found
