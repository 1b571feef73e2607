"""Attention over lists of keys on the keys that are read, chunk by chunk: memory linear in the length.

A chunk is some consecutive segments of a document. Each gathers its sinks, its list and its own range of rows, and all
are multiplied in one batch, padded to the longest of the chunk. Backward recomputes the weights from the saved
log-sum-exp. Chunks start with their document, so that a packed document is computed exactly like one alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.gather import CHUNK_ELEMENTS
from sparsetrain_kernels.listed_keys.inputs import ListedInputs, Segment


class _Chunk(NamedTuple):
    """``G`` segments of at most ``R`` computed rows each, with ``C`` places for keys."""

    rows: Tensor
    """``[G, R]`` rows of the query; places past a segment's end repeat its last row."""
    exists: Tensor
    """bool ``[G, R]``."""
    keys: Tensor
    """``[B, Hkv, G, C]`` rows of the key. Unused places repeat the segment's first row, which all its rows see."""
    hidden: Tensor
    """bool ``[B, Hkv, G, 1, R, C]``: pairs that are not seen."""


def gathered_forward(inputs: ListedInputs) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, N, D]``, laid out like the query, and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs)."""
    query, key, value = inputs.query, inputs.key.contiguous(), inputs.value.contiguous()
    heads = _Heads(inputs)
    out = torch.zeros_like(query)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=heads.dtype, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for chunk in _chunks(inputs):
            logits = heads.read_rows(query, chunk) * inputs.scale @ heads.read_keys(key, chunk).mT
            heads.by_row(logits).masked_fill_(chunk.hidden, float("-inf"))
            peak = logits.amax(-1, keepdim=True)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            heads.write_rows(out, chunk, weights @ heads.read_keys(value, chunk) / total)
            heads.write_rows(lse, chunk, peak + total.log())
    return out, lse


def gathered_backward(
    inputs: ListedInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them; the same bit for bit on every run."""
    query, key, value = inputs.query, inputs.key.contiguous(), inputs.value.contiguous()
    heads = _Heads(inputs)
    # The softmax's backward: grad_logits = weights * (grad_weights - delta).
    delta = (grad_out.to(heads.dtype) * out.to(heads.dtype)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = (torch.zeros(key.shape, dtype=heads.dtype, device=key.device) for _ in range(2))
    with torch.autocast(query.device.type, enabled=False):
        for chunk in _chunks(inputs):
            queries = heads.read_rows(query, chunk) * inputs.scale
            grads = heads.read_rows(grad_out, chunk)
            keys = heads.read_keys(key, chunk)
            weights = (queries @ keys.mT).sub_(heads.read_rows(lse, chunk)).exp_()
            heads.by_row(weights).masked_fill_(chunk.hidden, 0)
            heads.add_keys(grad_value, chunk, weights.mT @ grads)
            grad_logits = grads @ heads.read_keys(value, chunk).mT
            grad_logits.sub_(heads.read_rows(delta, chunk)).mul_(weights)
            heads.write_rows(grad_query, chunk, grad_logits @ keys * inputs.scale)
            heads.add_keys(grad_key, chunk, grad_logits.mT @ queries)
    return grad_query, torch.empty_like(inputs.key).copy_(grad_key), torch.empty_like(inputs.value).copy_(grad_value)


def pairs_seen(inputs: ListedInputs) -> int:
    """Pairs of a row and a key that it sees, over all KV heads; as many as there may be where nothing has a value."""
    if isinstance(inputs.lists, torch._subclasses.FakeTensor):
        per_row = inputs.sinks + inputs.window + inputs.lists.shape[3] * inputs.granule
        return inputs.key.shape[0] * inputs.key.shape[1] * inputs.query.shape[2] * per_row
    return sum(int((~chunk.hidden).sum()) for chunk in _chunks(inputs))


def _chunks(inputs: ListedInputs) -> Iterator[_Chunk]:
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


def _chunk(inputs: ListedInputs, segments: list[Segment], height: int, listed: int, near: int) -> _Chunk:
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
    return _Chunk(rows, exists, keys, hidden)


class _Heads:
    """Moves rows and keys between their tensors and the batched products of a chunk, ``[B, Hkv, G, M, ...]`` with ``M``
    the rows of all query heads that share a KV head: keys are never repeated."""

    def __init__(self, inputs: ListedInputs) -> None:
        self.kv_heads = inputs.key.shape[1]
        self.group = inputs.query.shape[1] // self.kv_heads
        self.dtype = torch.promote_types(inputs.query.dtype, torch.float32)

    def by_row(self, tiles: Tensor) -> Tensor:
        """``[B, Hkv, G, M, E]`` seen as ``[B, Hkv, G, group, R, E]``."""
        return tiles.unflatten(3, (self.group, -1))

    def read_rows(self, source: Tensor, chunk: _Chunk) -> Tensor:
        """Rows of ``[B, Hq, N]`` or ``[B, Hq, N, E]``, in the compute dtype; ``E`` is 1 where there is none."""
        rows = source[:, :, chunk.rows].to(self.dtype)
        rows = (rows if rows.dim() == 5 else rows[..., None]).unflatten(1, (self.kv_heads, self.group))
        return rows.transpose(2, 3).flatten(3, 4)

    def write_rows(self, target: Tensor, chunk: _Chunk, tiles: Tensor) -> None:
        rows = self.by_row(tiles).transpose(2, 3).flatten(1, 2)[:, :, chunk.exists]
        target[:, :, chunk.rows[chunk.exists]] = rows.to(target.dtype).reshape(*rows.shape[:3], *target.shape[3:])

    def read_keys(self, source: Tensor, chunk: _Chunk) -> Tensor:
        """The chunk's rows of ``[B, Hkv, N, D]``, ``[B, Hkv, G, C, D]``, in the compute dtype."""
        # An embedding lookup is the fastest gather of rows torch has on CPU.
        return F.embedding(_flat_rows(source, chunk), source.view(-1, source.shape[-1])).to(self.dtype)

    def add_keys(self, target: Tensor, chunk: _Chunk, tiles: Tensor) -> None:
        """Add to the chunk's rows of ``[B, Hkv, N, D]``, each sum in one fixed order: no atomics, on CUDA neither."""
        index, source = _flat_rows(target, chunk).flatten(), tiles.flatten(0, 3)
        rows = target.view(-1, target.shape[-1])
        if target.is_cuda:
            rows.index_put_((index,), source, accumulate=True)
        else:
            rows.index_add_(0, index, source)


def _flat_rows(tensor: Tensor, chunk: _Chunk) -> Tensor:
    """Where the chunk's keys lie in the flattened ``[B * Hkv * N, ...]``, ``[B, Hkv, G, C]``."""
    batch, heads, tokens = tensor.shape[:3]
    pair = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1, 1)
    return pair * tokens + chunk.keys
