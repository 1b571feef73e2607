"""Split a batch over the ranks of sequence parallelism."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from sparsetrain.data.batch import IGNORE, Batch


def sequence_part(batch: Batch, rank: int, ranks: int) -> Batch:
    """The part of a batch for one of ``ranks`` ranks: equal numbers of tokens on each, in order.

    Documents may span ranks, so ``cu_seqlens`` stays that of the whole batch, and positions are those in the document.
    If the tokens do not divide evenly, up to ``ranks - 1`` padding tokens are added at the end as a separate document
    without loss.

    Args:
        batch: A whole batch, ``[1, T]``.
        rank: This rank among those that share the batch.

    Returns:
        A batch of ``[1, t]`` tokens, ``t = ceil(T / ranks)``. Its labels are ``[1, t + 1]``: the last one is the first
        of the next rank, as that token is predicted here.
    """
    length = batch.input_ids.shape[1]
    padding = -length % ranks
    size = (length + padding) // ranks
    start, end = rank * size, (rank + 1) * size
    boundaries = batch.cu_seqlens
    if padding:
        boundaries = torch.cat([boundaries, boundaries.new_tensor([length + padding])])
    positions = torch.cat([batch.position_ids, torch.arange(padding)[None]], dim=1)
    labels = pad(batch.labels, (0, padding + 1), value=IGNORE)[:, start : end + 1]
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, padding))[:, start:end],
        position_ids=positions[:, start:end],
        cu_seqlens=boundaries,
        labels=labels,
        prompts=[*batch.prompts, padding] if padding else batch.prompts,
        num_target_tokens=int((labels[:, 1:] != IGNORE).sum()),
        padding=max(0, end - max(start, length)),
    )
