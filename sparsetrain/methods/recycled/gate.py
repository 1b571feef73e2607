"""Similarity gating: which of the rows that could choose do so (RefreshKV, 2411.05787, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

TOGETHER = 1024
"""Rows that are compared with all later ones at once."""

torch.library.define("sparsetrain::recycled_gate", "(Tensor mean, Tensor documents, float similarity) -> Tensor")


@torch.library.impl("sparsetrain::recycled_gate", "default")
def _gate(mean: Tensor, documents: Tensor, similarity: float) -> Tensor:
    """As :func:`choosing_rows`; an operation of its own, so that activation checkpointing keeps its result."""
    unit = torch.nn.functional.normalize(mean, dim=-1)
    count = len(unit)
    place = torch.arange(count, device=mean.device)
    nearest = []
    for rows in place.split(TOGETHER):
        later = (place > rows[:, None]) & (documents == documents[rows][:, None])
        far = later & (unit[rows] @ unit.mT <= similarity)
        nearest.append(torch.where(far.any(-1), far.int().argmax(-1), count))
    after, document = torch.cat(nearest).tolist(), documents.tolist()
    chosen = torch.zeros(count, dtype=torch.bool)
    for first in range(count):
        if first == 0 or document[first] != document[first - 1]:
            row = first
            while row < count:
                chosen[row] = True
                row = after[row]
    return chosen.to(mean.device)


@torch.library.register_fake("sparsetrain::recycled_gate")
def _gate_shapes(mean: Tensor, documents: Tensor, similarity: float) -> Tensor:
    return documents.new_empty(documents.shape, dtype=torch.bool)


@torch.no_grad()
def choosing_rows(query: Tensor, documents: Tensor, similarity: float) -> Tensor:
    """The rows that choose, bool ``[G]``: the first of each document, and then each whose mean query has a cosine
    similarity of at most ``similarity`` to that of the last one that did. The host waits for the device once.

    Args:
        query: ``[Hq, G, D]``, of the rows that could choose, in ascending order.
        documents: int32 ``[G]``, the document of each.
    """
    found: Tensor = torch.ops.sparsetrain.recycled_gate(query.float().mean(0), documents, similarity)
    return found
