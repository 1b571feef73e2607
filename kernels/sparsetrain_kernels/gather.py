"""Attention over gathered blocks of keys, chunk by chunk: never more than a chunk of logits exists.

Query blocks are aligned to absolute position, so each has one list of key blocks. A chunk takes some query blocks of
some KV heads, gathers their listed keys and values and multiplies them in one batch; query heads that share a KV head
are rows of the same product, so keys are never repeated. Backward recomputes the logits from the saved log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.inputs import AttentionInputs, Document

CHUNK_ELEMENTS = 2**21
"""Logits computed at a time: enough to batch small blocks into large products, few enough to stay near the cache. A
longer context adds chunks, not memory."""


class TileLists(Protocol):
    """The key blocks of each query block. Hashable: index tensors are cached."""

    @property
    def block(self) -> int:
        """Tokens in a block. Block ``t`` of a document holds its positions ``t * block`` to ``(t + 1) * block - 1``."""

    @property
    def per_head(self) -> bool:
        """Whether the KV heads have different lists."""

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        """Key blocks of ``query_block`` for KV head ``head``: ascending, unique, none later, itself included."""

    def __hash__(self) -> int: ...


def gather_attention(inputs: AttentionInputs, pattern: TileLists, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of each query over the keys of its listed blocks that are not later, in its own document.

    Args:
        inputs: the checked arguments; keys and values outside the listed blocks are never read.
        pattern: the key blocks of each query block.
        window: also hide the keys ``window`` tokens back and further.

    Returns:
        ``out [B, Hq, N, D]`` in the query's dtype and ``lse [B, Hq, N]`` (fp32, or fp64 for fp64 inputs), the log of
        the softmax denominator, sink included. Both are differentiable.
    """
    return _GatherAttention.apply(*inputs, pattern, window)


class _Plan(NamedTuple):
    """The ``U`` query blocks of a call in the order of their rows, and their lists for ``H`` heads (1 or all of KV)."""

    block: int
    window: int | None
    height: int
    """Rows of the tallest query block; the others are padded to it."""
    first_row: list[int]
    """``[U + 1]`` where each query block starts in ``query``, then where the last one ends."""
    own_key: Tensor
    """``[U]`` where the position of each query block's first row lies in ``key``."""
    listed: Tensor
    """``[H, U, L]`` where each listed block starts in ``key``. Lists end in the last slot; unused slots repeat the
    query block itself."""
    lengths: Tensor
    """``[H, U]`` listed blocks."""


@lru_cache(maxsize=32)
def _plan(pattern: TileLists, documents: tuple[Document, ...], heads: int, window: int | None) -> _Plan:
    block = pattern.block
    first_row, own_key = [], []
    lists: list[list[list[int]]] = [[] for _ in range(heads)]
    for row, rows, position, key in documents:
        for query_block in range(position // block, (position + rows - 1) // block + 1):
            first = max(query_block * block, position)
            first_row.append(row + first - position)
            own_key.append(key + first)
            for head in range(heads):
                lists[head].append([key + j * block for j in pattern.key_blocks(query_block, head)])
    first_row.append(row + rows)
    height = max(end - start for start, end in pairwise(first_row))
    lengths = torch.tensor([[len(keys) for keys in units] for units in lists])
    longest = int(lengths.max())
    listed = torch.tensor([[keys[-1:] * (longest - len(keys)) + keys for keys in units] for units in lists])
    return _Plan(block, window, height, first_row, torch.tensor(own_key), listed, lengths)


class _Chunk(NamedTuple):
    """``X`` consecutive (batch, KV head) pairs times ``U`` consecutive query blocks of ``R`` rows with ``C`` keys."""

    pairs: slice
    rows: slice
    row_of_slot: Tensor
    """``[U * R]`` row, counted from the chunk's first, of each slot of the padded query blocks."""
    slot_of_row: Tensor
    """``[rows]`` the inverse."""
    keys: Tensor
    """``[X * U, C]`` rows of the flattened keys ``[B * Hkv * M, D]``."""
    hidden: Tensor
    """bool ``[X or 1, U, 1, R, C]``: later keys, keys before the window or in unused slots, and all in padding rows."""


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *inputs, pattern, window = args
        return gather_forward(AttentionInputs(*inputs), pattern, window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, cu_seqlens, *ctx.numbers, sink_logits, ctx.pattern, ctx.window = inputs
        ctx.save_for_backward(query, key, value, cu_seqlens, sink_logits, *output)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sink_logits, out, lse = ctx.saved_tensors
        inputs = AttentionInputs._make((*tensors, *ctx.numbers, sink_logits))
        *grads, delta = gather_backward(inputs, ctx.pattern, grad_out, grad_lse, out, lse, ctx.window)
        return *grads, None, None, None, None, sink_gradient(sink_logits, lse, delta), None, None


def gather_forward(inputs: AttentionInputs, pattern: TileLists, window: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`gather_attention` without its gradient."""
    query, key, value = inputs[:3]
    tiles = _Tiles(_plan_of(inputs, pattern, window), query, key)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=tiles.dtype, device=query.device)
    sink = None if inputs.sink_logits is None else tiles.sink_rows(inputs.sink_logits)
    with torch.autocast(query.device.type, enabled=False):
        for chunk in tiles.chunks():
            keys = tiles.read_keys(key, chunk)
            logits = _logits(tiles.read_rows(query, chunk) * inputs.scale, keys, inputs.softcap)
            tiles.grid(logits, chunk).masked_fill_(chunk.hidden, float("-inf"))
            peak = logits.amax(-1, keepdim=True)
            if sink is not None:
                peak = peak.maximum(tiles.read_rows(sink, chunk))
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            if sink is not None:
                total += torch.exp(tiles.read_rows(sink, chunk) - peak)
            # Padding rows are NaN here (every key hidden); they are not written.
            tiles.write_rows(out, chunk, torch.bmm(weights, tiles.read_keys(value, chunk)) / total)
            tiles.write_rows(lse, chunk, peak + total.log())
    return _laid_out_like(query, out), lse


def gather_backward(
    inputs: AttentionInputs,
    pattern: TileLists,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them, and ``delta [B, Hq, N]``: the sum of each row's
    ``grad_out * out``, less the gradient of its log-sum-exp."""
    query, key, value = inputs[:3]
    tiles = _Tiles(_plan_of(inputs, pattern, window), query, key)
    # The softmax's backward: grad_logits = weights * (grad_weights - delta).
    delta = (grad_out.to(tiles.dtype) * out.to(tiles.dtype)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=tiles.dtype, device=key.device)
    grad_value = torch.zeros_like(grad_key)
    with torch.autocast(query.device.type, enabled=False):
        for chunk in tiles.chunks():
            queries = tiles.read_rows(query, chunk) * inputs.scale
            keys = tiles.read_keys(key, chunk)
            grads = tiles.read_rows(grad_out, chunk)
            logits = _logits(queries, keys, inputs.softcap)
            slope = None if inputs.softcap is None else 1 - (logits / inputs.softcap).square()
            weights = logits.sub_(tiles.read_rows(lse, chunk)).exp_()
            tiles.grid(weights, chunk).masked_fill_(chunk.hidden, 0)
            tiles.add_keys(grad_value, chunk, torch.bmm(weights.mT, grads))
            grad_logits = torch.bmm(grads, tiles.read_keys(value, chunk).mT)
            grad_logits.sub_(tiles.read_rows(delta, chunk)).mul_(weights)
            if slope is not None:
                grad_logits.mul_(slope)
            tiles.write_rows(grad_query, chunk, torch.bmm(grad_logits, keys) * inputs.scale)
            tiles.add_keys(grad_key, chunk, torch.bmm(grad_logits.mT, queries))
    return (
        _laid_out_like(query, grad_query),
        _laid_out_like(key, grad_key),
        _laid_out_like(value, grad_value),
        delta,
    )


def _laid_out_like(tensor: Tensor, contents: Tensor) -> Tensor:
    """The contents in the dtype and memory layout of a copy of ``tensor``; themselves, where they have them."""
    like = torch.empty_like(tensor)
    fits = contents.dtype == like.dtype and contents.stride() == like.stride()
    return contents if fits else like.copy_(contents)


def sink_gradient(sink_logits: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """The gradient of learned sink logits ``[Hq]``, from ``lse`` and ``delta [B, Hq, N]``."""
    if sink_logits is None:
        return None
    return -(torch.exp(sink_logits.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2)).to(sink_logits.dtype)


def _plan_of(inputs: AttentionInputs, pattern: TileLists, window: int | None) -> _Plan:
    heads = inputs.key.shape[1] if pattern.per_head else 1
    return _plan(pattern, inputs.documents(), heads, window)


def _logits(queries: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    logits = torch.bmm(queries, keys.mT)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class _Tiles:
    """Moves rows and keys between their tensors and the batched tiles of a chunk, ``[X * U, G * R, ...]``."""

    def __init__(self, plan: _Plan, query: Tensor, key: Tensor) -> None:
        self.plan = plan
        self.device = query.device
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        batch, self.kv_heads, self.keys, _ = key.shape
        self.pairs = batch * self.kv_heads
        self.group = query.shape[1] // self.kv_heads
        self.shape = query.shape[:3]

    def sink_rows(self, sink_logits: Tensor) -> Tensor:
        """The sink logits as one number a row, ``[B, Hq, N]``."""
        return sink_logits.to(self.dtype)[:, None].expand(self.shape)

    def grid(self, tiles: Tensor, chunk: _Chunk) -> Tensor:
        """``[X * U, G * R, E]`` seen as ``[X, U, G, R, E]``."""
        return tiles.view(chunk.pairs.stop - chunk.pairs.start, -1, self.group, self.plan.height, tiles.shape[-1])

    def read_rows(self, source: Tensor, chunk: _Chunk) -> Tensor:
        """Rows of ``[B, Hq, N]`` or ``[B, Hq, N, E]``, in the compute dtype."""
        rows = self._by_pair(source)[chunk.pairs, :, chunk.rows].index_select(2, chunk.row_of_slot).to(self.dtype)
        units = rows.unflatten(2, (-1, self.plan.height)).transpose(1, 2)
        return units.reshape(-1, self.group * self.plan.height, rows.shape[-1])

    def write_rows(self, target: Tensor, chunk: _Chunk, tiles: Tensor) -> None:
        rows = self.grid(tiles, chunk).transpose(1, 2).flatten(2, 3).index_select(2, chunk.slot_of_row)
        self._by_pair(target)[chunk.pairs, :, chunk.rows] = rows.to(target.dtype)

    def read_keys(self, source: Tensor, chunk: _Chunk) -> Tensor:
        """The listed rows of ``[B, Hkv, M, D]``, ``[X * U, C, D]``."""
        # An embedding lookup is the fastest gather of rows torch has on CPU.
        return F.embedding(chunk.keys, source.reshape(-1, source.shape[-1])).to(self.dtype)

    def add_keys(self, target: Tensor, chunk: _Chunk, tiles: Tensor) -> None:
        """Add to the listed rows. Each row is summed in one fixed order: no atomics, on CPU nor on CUDA."""
        index, source = chunk.keys.flatten(), tiles.flatten(0, 1)
        rows = target.view(-1, target.shape[-1])
        if target.is_cuda:
            rows.index_put_((index,), source, accumulate=True)
        else:
            rows.index_add_(0, index, source)

    def chunks(self) -> Iterator[_Chunk]:
        """Cut the call into chunks of about ``CHUNK_ELEMENTS`` logits, and at least one query block of one KV head."""
        lengths = self.plan.lengths.amax(0).tolist()
        logits_per_listed_block = self.group * self.plan.height * self.plan.block
        start = 0
        while start < len(lengths):
            stop, longest = start, 0
            while stop < len(lengths):
                candidate = max(longest, lengths[stop])
                logits = self.pairs * logits_per_listed_block * candidate * (stop + 1 - start)
                if stop > start and logits > CHUNK_ELEMENTS:
                    break
                stop, longest = stop + 1, candidate
            pairs = max(1, CHUNK_ELEMENTS // (logits_per_listed_block * longest * (stop - start)))
            for first in range(0, self.pairs, pairs):
                yield self._chunk(slice(start, stop), slice(first, min(first + pairs, self.pairs)), longest)
            start = stop

    def _chunk(self, units: slice, pairs: slice, longest: int) -> _Chunk:
        plan = self.plan
        first_row = torch.tensor(plan.first_row[units.start : units.stop + 1])
        heights = first_row.diff()[:, None]
        slot = torch.arange(plan.height)
        padding = slot >= heights
        row = slot.minimum(heights - 1)

        own = plan.own_key[units, None] + row
        key = (plan.listed[:, units, -longest:, None] + torch.arange(plan.block)).flatten(2)
        unused = torch.arange(longest) < longest - plan.lengths[:, units, None]
        hidden = key[:, :, None] > own[:, :, None]
        hidden |= unused.repeat_interleave(plan.block, -1)[:, :, None] | padding[:, :, None]
        # A hidden key takes part in the products with weight zero, so it must be one that some row here does see.
        key = key.minimum(own[:, -1:])
        if plan.window is not None:
            hidden |= key[:, :, None] <= own[:, :, None] - plan.window
            key = key.maximum(own[:, :1] - plan.window + 1)

        pair = torch.arange(pairs.start, pairs.stop)
        if len(plan.listed) > 1:
            key, hidden = key[pair % self.kv_heads], hidden[pair % self.kv_heads]
        return _Chunk(
            pairs,
            slice(plan.first_row[units.start], plan.first_row[units.stop]),
            (first_row[:-1, None] - first_row[0] + row).flatten().to(self.device),
            padding.logical_not().flatten().nonzero().flatten().to(self.device),
            (pair[:, None, None] * self.keys + key).flatten(0, 1).to(self.device),
            hidden[:, :, None].to(self.device),
        )

    def _by_pair(self, tensor: Tensor) -> Tensor:
        """``[B, Hq, N]`` or ``[B, Hq, N, E]`` as ``[B * Hkv, G, N, E]``."""
        return tensor.reshape(self.pairs, self.group, self.shape[2], -1)
