"""Split rows over the ranks of sequence parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sparsetrain.data.batch import Batch, Row, prompt_lengths
from sparsetrain.data.document import IGNORE


def collate_part(rows: Sequence[Row], rank: int, ranks: int) -> Batch:
    """The part for one of ``ranks`` ranks of what :func:`~sparsetrain.data.batch.collate` makes of rows: equal numbers
    of tokens on each, in order. No tensor of the size of the whole batch is made, and the part keeps none alive.

    Documents may span ranks, so ``cu_seqlens`` and ``prompts`` are those of the whole batch, and positions are those in
    the document. If the tokens do not divide evenly, up to ``ranks - 1`` padding tokens are added at the end as a
    separate document without loss.

    Args:
        rows: The rows of the batch, ``T`` tokens together.
        rank: This rank among those that share the batch.

    Returns:
        A batch of ``[1, t]`` tokens, ``t = ceil(T / ranks)``. Its labels are ``[1, t + 1]``: the last one is the first
        of the next rank, as that token is predicted here.
    """
    prompts = [n for row in rows for n in prompt_lengths(row.labels, np.cumsum([0, *row.lengths], dtype=np.int32))]
    lengths = [length for row in rows for length in row.lengths]
    length = sum(lengths)
    padding = -length % ranks
    if padding:
        lengths, prompts = [*lengths, padding], [*prompts, padding]
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    size = (length + padding) // ranks
    start, end = rank * size, (rank + 1) * size
    labels = _cut([row.labels for row in rows], start, end + 1, IGNORE)
    tokens = np.arange(start, end)
    return Batch(
        input_ids=torch.from_numpy(_cut([row.input_ids for row in rows], start, end, 0))[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(tokens - bounds[np.searchsorted(bounds, tokens, side="right") - 1])[None],
        cu_seqlens=torch.from_numpy(bounds),
        num_target_tokens=int((labels[1:] != IGNORE).sum()),
        origin=[name for row in rows for name in row.origin],
        prompts=prompts,
        padding=max(0, end - max(start, length)),
    )


def sequence_part(batch: Batch, rank: int, ranks: int) -> Batch:
    """The part of a batch that is there as a whole, as :func:`collate_part` makes it of rows."""
    lengths = batch.cu_seqlens.diff().tolist()
    row = Row(batch.input_ids[0].numpy(), batch.labels[0].numpy(), lengths, batch.origin)
    part = collate_part([row], rank, ranks)
    # Its labels may have been changed since.
    return replace(part, prompts=[*batch.prompts, *part.prompts[len(batch.prompts) :]])


def _cut(parts: Sequence[np.ndarray], start: int, end: int, fill: int) -> np.ndarray:
    """Elements ``start`` to ``end`` of int64 arrays behind one another, and ``fill`` beyond their end."""
    found = np.full(end - start, fill, dtype=np.int64)
    offset = 0
    for part in parts:
        first, last = max(start, offset), min(end, offset + len(part))
        if first < last:
            found[first - start : last - start] = part[first - offset : last - offset]
        offset += len(part)
    return found
