"""One sequence over several ranks: which tokens of a batch each of them holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from sparsetrain.data.batch import IGNORE, Batch


def sequence_part(batch: Batch, rank: int, ranks: int) -> Batch:
    """The tokens of a batch that one of ``ranks`` ranks holds: equally many on each, in order.

    Documents may go on from one rank to the next, so ``cu_seqlens`` stays that of the whole batch, and positions are
    those in the document. Where the tokens do not divide, up to ``ranks - 1`` are added at the end as a document of
    their own, which no other token sees and which carries no loss.

    Args:
        batch: a whole batch, ``[1, T]``.
        rank: this rank among those that share the batch.

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
        num_target_tokens=int((labels[:, 1:] != IGNORE).sum()),
        padding=max(0, end - max(start, length)),
    )
