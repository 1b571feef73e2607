"""SPARSEK and its causal selection row by row, in numpy's float64: slow, and obviously right."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def sum_of_gates(z: Array, tau: float) -> float:
    return float(np.clip(z - tau, 0, 1).sum())


def threshold(z: Array, k: float) -> float:
    """The smallest tau with ``sum(clip(z - tau, 0, 1)) == k``, or ``-inf`` where z has at most k entries."""
    if len(z) <= k:
        return -np.inf
    points = np.unique(np.concatenate([z, z - 1]))
    # The sum falls from len(z) to 0, linearly between these points.
    first = bisect_left(points, True, key=lambda point: sum_of_gates(z, point) <= k)
    if first == 0:
        # Numbers so large that z - 1 is z: there is no point at which all are counted.
        return float(points[0])
    before, after = points[first - 1 : first + 1]
    most, least = sum_of_gates(z, before), sum_of_gates(z, after)
    rise = (most - k) / (most - least)
    return float(before + rise * (after - before)) if rise < 1 else float(after)


def project(z: Array, k: float) -> Array:
    """SPARSEK of one vector."""
    return np.clip(z - threshold(z, k), 0, 1)


@dataclass
class Selection:
    """Of one sequence, as matrices ``[rows, keys]`` and thresholds ``[rows]``."""

    threshold: Array
    candidate: NDArray[np.bool_]
    selected: NDArray[np.bool_]
    interior: NDArray[np.bool_]
    gate: Array


def select(scores: Array, topk: int, window: int, sinks: int = 0) -> Selection:
    """Every row of one document, by sorting what it sees."""
    length = len(scores)
    taus = np.full(length, -np.inf)
    candidate, selected, interior = (np.zeros((length, length), bool) for _ in range(3))
    gate = np.zeros((length, length))
    for row in range(length):
        keys = np.arange(sinks, max(row - window + 1, sinks))
        candidate[row, keys] = True
        taus[row] = threshold(scores[keys], topk)
        margin = scores[keys] - taus[row]
        interior[row, keys] = (margin > 0) & (margin < 1)
        gate[row, keys] = np.clip(margin, 0, 1)
        # Of equal scores the newer key: a larger index.
        best = np.lexsort((keys, scores[keys]))[::-1][:topk]
        selected[row, keys[best]] = True
    return Selection(taus, candidate, selected, interior, gate)


def covered(start: Tensor, end: Tensor) -> Tensor:
    """bool ``[rows, keys]``: whether ``start[key] <= row < end[key]``."""
    row = torch.arange(len(start))[:, None]
    return (start <= row) & (row < end)
