"""SparseK's selection and the attention over it, row by row in numpy: slow, in fp64, and sharing no code with ours."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Selection(NamedTuple):
    """What :func:`~sparsetrain_kernels.selected_attention` takes of a selection."""

    scores: Tensor
    threshold: Tensor
    exit: Tensor


def select(scores: Tensor, topk: int, window: int, sinks: int, bounds: list[int]) -> Selection:
    """Threshold and exits of ``scores [B, H, N]``, each row on its own: sort its candidates, walk the breakpoints."""
    values = scores.detach().double().numpy()
    threshold = np.full(values.shape, -np.inf)
    exits = np.empty(values.shape, dtype=np.int32)
    for place in np.ndindex(values.shape[:2]):
        for start, stop in pairwise(bounds):
            for j in range(start, stop):
                exits[place][j] = stop if j < start + sinks else min(j + window, stop)
            for row in range(start, stop):
                candidates = np.arange(start + sinks, row - window + 1)
                u = values[place][candidates]
                if len(candidates) > topk:
                    threshold[place][row] = _threshold(u, topk)
                # Of equal scores the newer wins: the candidates are in order of age, and the sort is stable.
                kept = candidates[np.argsort(u, kind="stable")[::-1][:topk]] if len(candidates) else candidates
                exits[place][kept] = row + 1
    return Selection(scores, torch.from_numpy(threshold).to(scores), torch.from_numpy(exits))


def _threshold(u: np.ndarray, topk: int) -> float:
    """The root of ``sum clip(u - tau, 0, 1) = topk``, interpolated between the breakpoints around it."""
    points = np.unique(np.concatenate((u, u - 1)))
    sums = np.clip(u - points[:, None], 0, 1).sum(1)
    right = int(np.argmax(sums <= topk))
    low, high = points[right - 1], points[right]
    share = (sums[right - 1] - topk) / (sums[right - 1] - sums[right])
    return low + share * (high - low)


def attend(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    scores: np.ndarray,
    threshold: np.ndarray,
    exits: np.ndarray,
    *,
    window: int,
    sinks: int,
    gate: str,
    bounds: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """``out`` and ``lse``, a loop over rows; the gates multiply as the definition writes them."""
    batch, heads, tokens, head_dim = query.shape
    out, lse = np.empty(query.shape), np.empty(query.shape[:3])
    group = heads // key.shape[1]
    starts = np.concatenate([np.full(stop - start, start) for start, stop in pairwise(bounds)])
    for b, h, row in np.ndindex(batch, heads, tokens):
        kv, s = h // group, (h // group if scores.shape[1] > 1 else 0)
        seen, gates = [], []
        for j in range(starts[row], row + 1):
            if j > row - window or j - starts[row] < sinks:
                seen.append(j)
                gates.append(1.0)
            elif row < exits[b, s, j]:
                seen.append(j)
                gates.append(min(max(scores[b, s, j] - threshold[b, s, row], 0.0), 1.0))
        weights = np.exp(key[b, kv, seen] @ query[b, h, row] * head_dim**-0.5)
        if gate == "log":
            weights = weights * gates
        lse[b, h, row] = np.log(weights.sum())
        mixed = weights * gates if gate == "value" else weights
        out[b, h, row] = mixed @ value[b, kv, seen] / weights.sum()
    return out, lse
