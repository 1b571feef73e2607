"""Which keys a row chooses for the rows behind it."""

from __future__ import annotations

from typing import Any

import torch
from sparsetrain_kernels import top_k_keys, top_p_keys
from torch import Tensor

from sparsetrain.methods.recycled.rules import Rules
from sparsetrain.methods.recycled.segments import Segments

POOLED = 7
"""Neighbours of which a key has the largest weight (2411.05787, section 3)."""


@torch.no_grad()
def choose(
    rules: Rules, query: Tensor, key: Tensor, lse: Tensor, segments: Segments, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The keys that each segment's first row chooses.

    Args:
        query: ``[1, Hq, G, D]``, of these rows.
        key: ``[1, Hkv, N, D]``.
        lse: ``[1, Hq, G]``, the log-sum-exp of these rows.
        cu_seqlens: int32 ``[documents + 1]``; None for one document.

    Returns:
        int32 ``[1, Hkv, G, keep]``, positions that count from the start of the document, and how many there are, int32
        ``[1, Hkv, G]``. What lies behind a count is undefined.
    """
    given: dict[str, Any] = {"query_positions": segments.starts, "cu_seqlens": cu_seqlens, "scale": scale}
    given |= {"sinks": rules.sinks, "window": rules.recent}
    if rules.p is None:
        found = top_k_keys(query, key, lse, rules.keep, width=POOLED, **given)
    else:
        found = top_p_keys(query, key, lse, rules.p, capacity=rules.keep, **given)
    return found.lists, found.counts
