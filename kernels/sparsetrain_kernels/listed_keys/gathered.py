"""Attention over lists of keys on the keys that are read, chunk by chunk: memory linear in the length.

A chunk is some consecutive segments of a document. Each gathers its sinks, its list and its own range of rows, and all
are multiplied in one batch, padded to the longest of the chunk. Chunks start with their document, so that a packed
document is computed exactly like one alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetrain_kernels.gather import CHUNK_ELEMENTS
from sparsetrain_kernels.key_lists.gathered import Chunk, attend, attend_backward
from sparsetrain_kernels.listed_keys.inputs import ListedInputs, Segment


def gathered_forward(inputs: ListedInputs) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, N, D]``, laid out like the query, and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs)."""
    return attend(*inputs[:3], inputs.scale, _chunks(inputs))


def gathered_backward(
    inputs: ListedInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, laid out like them; the same bit for bit on every run."""
    return attend_backward(*inputs[:3], inputs.scale, _chunks(inputs), (out, lse, grad_out, grad_lse))


def pairs_seen(inputs: ListedInputs) -> int:
    """Pairs of a row and a key that it sees, over all KV heads; as many as there may be where nothing has a value."""
    if isinstance(inputs.lists, torch._subclasses.FakeTensor):
        per_row = inputs.sinks + inputs.window + inputs.lists.shape[3] * inputs.granule
        return inputs.key.shape[0] * inputs.key.shape[1] * inputs.query.shape[2] * per_row
    return sum(int((~chunk.hidden).sum()) for chunk in _chunks(inputs))


def _chunks(inputs: ListedInputs) -> Iterator[Chunk]:
    """Chunks of about ``CHUNK_ELEMENTS`` logits, and at least one segment."""
    counts = inputs.counts.amax((0, 1)).tolist()
    heads = inputs.query.shape[0] * inputs.query.shape[1]
    for segments in inputs.segments():
        start = 0
        while start < len(segments):
            stop, rows, listed, most = start, 0, 0, inputs.sinks + inputs.window
            while stop < len(segments):
                segment = segments[stop]
                tallest = max(rows, segment.end - segment.first)
                longest = max(listed, counts[segment.number])
                width = inputs.sinks + inputs.window + tallest + longest * inputs.granule
                if stop > start and heads * (stop + 1 - start) * tallest * width > CHUNK_ELEMENTS:
                    break
                stop, rows, listed, most = stop + 1, tallest, longest, width
            yield _chunk(inputs, segments[start:stop], rows, listed, most - inputs.sinks - listed * inputs.granule)
            start = stop


def _chunk(inputs: ListedInputs, segments: list[Segment], height: int, listed: int, near: int) -> Chunk:
    """``listed`` places of the lists are used; ``near`` keys lie from the window's start to the last row's own."""
    device = inputs.query.device
    number, first, end, document = (torch.tensor(numbers, device=device)[:, None] for numbers in zip(*segments))
    rows = first + torch.arange(height, device=device)
    exists = rows < end
    rows = rows.minimum(end - 1)

    sink = document + torch.arange(inputs.sinks, device=device)
    low = (first - inputs.window).maximum(document)
    close = low + torch.arange(near, device=device)
    always = torch.cat((sink, close), 1)
    seen = torch.cat((sink < low, close < end), 1)
    # Entries past a list's count may hold anything.
    used = torch.arange(listed, device=device) < inputs.counts[:, :, number[:, 0], None]
    entries = inputs.lists[:, :, number[:, 0], :listed].long() * used
    keys = entries[..., None] * inputs.granule + torch.arange(inputs.granule, device=device)
    used = used[..., None] & (keys >= inputs.sinks) & (keys + document[..., None] < low[..., None])
    keys, used = keys.flatten(3) + document, used.flatten(3)

    shape = (*keys.shape[:3], always.shape[1])
    keys = torch.cat((always.expand(shape), keys), 3)
    used = torch.cat((seen.expand(shape), used), 3)
    keys = torch.where(used, keys, first)
    seen_at_all = used[:, :, :, None, None]
    hidden = ~seen_at_all | (keys[:, :, :, None, None] > rows[:, None, :, None]) | ~exists[:, None, :, None]
    return Chunk(rows, exists, keys, hidden)
