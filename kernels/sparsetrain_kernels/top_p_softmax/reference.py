"""Top-p attention in plain PyTorch: some rows at a time, each over all keys up to its own.

The forward pass computes a chunk's logits, finds each row's threshold and keeps it beside the log-sum-exp. The backward
pass computes the logits again. They may then differ in their last bits (another order of sums, another library), and a
threshold that equals a logit would drop that key or not, as it happens. So a threshold lies halfway between two logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.gather import CHUNK_ELEMENTS
from sparsetrain_kernels.inputs import Document


class Choice(NamedTuple):
    """Which keys a row reads; ``top_p_attention`` describes the numbers."""

    p: float
    sinks: int
    window: int
    union: bool


class _Chunk(NamedTuple):
    """``R`` consecutive rows of a document, and the ``C`` keys up to the last one's."""

    rows: slice
    keys: slice
    later: Tensor
    """bool ``[R, C]``: keys behind the row."""
    always: Tensor
    """bool ``[R, C]``: the first and the last keys, which are read whatever their weight."""


class TopPAttention(torch.autograd.Function):
    """``out [B, Hq, N, D]`` and ``lse [B, Hq, N]`` of the keys that are read, with their gradient."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, scale: float, choice: Choice, documents: tuple[Document, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(query, key, value, scale, choice, documents)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.settings = inputs[3:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:3], *output)

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out = ctx.saved_tensors[3]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return *_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.settings), None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, choice: Choice, documents: tuple[Document, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """``out [B, Hq, N, D]``, laid out like the query; ``lse`` and the thresholds, ``[B, Hq, N]`` each."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query)
    lse, thresholds = (torch.empty(query.shape[:3], dtype=dtype, device=query.device) for _ in range(2))
    with torch.autocast(query.device.type, enabled=False):
        for chunk in _chunks(query, choice, documents):
            logits = _logits(_rows(query, chunk, key) * scale, _keys(key, chunk, dtype))
            threshold = find_thresholds(logits, chunk.later, chunk.always, choice.p)
            logits = logits.masked_fill(_unread(logits, threshold, chunk, choice.union), -math.inf)
            total = logits.logsumexp(-1, keepdim=True)
            _write(out, chunk, _product((logits - total).exp(), _keys(value, chunk, dtype)))
            _write(lse, chunk, total)
            _write(thresholds, chunk, threshold)
    return out, lse, thresholds


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    thresholds: Tensor,
    scale: float,
    choice: Choice,
    documents: tuple[Document, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them."""
    # The softmax's backward: grad_logits = weights * (grad_weights - delta).
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros(key.shape, dtype=lse.dtype, device=key.device) for _ in range(2))
    with torch.autocast(query.device.type, enabled=False):
        for chunk in _chunks(query, choice, documents):
            queries, grads = _rows(query, chunk, key) * scale, _rows(grad_out, chunk, key)
            keys, values = _keys(key, chunk, lse.dtype), _keys(value, chunk, lse.dtype)
            logits = _logits(queries, keys)
            unread = _unread(logits, _rows(thresholds, chunk, key), chunk, choice.union)
            weights = (logits - _rows(lse, chunk, key)).exp().masked_fill(unread, 0)
            grad_logits = (weights * (_logits(grads, values) - _rows(delta, chunk, key))).masked_fill(unread, 0)
            _write(grad_query, chunk, _product(grad_logits, keys) * scale)
            grad_key[:, :, chunk.keys] += grad_logits.flatten(2, 3).mT @ queries.flatten(2, 3)
            grad_value[:, :, chunk.keys] += weights.flatten(2, 3).mT @ grads.flatten(2, 3)
    return grad_query, torch.empty_like(key).copy_(grad_key), torch.empty_like(value).copy_(grad_value)


def find_thresholds(logits: Tensor, later: Tensor, always: Tensor, p: float) -> Tensor:
    """Between the logits of the keys that a row reads and of those that it does not, ``[..., R, 1]``.

    Halfway between the least that is read and the largest that is not; -inf where all are read, and inf where what is
    always read has the share. A row with a NaN reads everything.

    Args:
        logits: ``[..., R, C]``.
        later: bool ``[R, C]``, keys behind the row.
        always: bool ``[R, C]``, keys that are read in any case.
        p: the share.
    """
    if p >= 1:
        return torch.full_like(logits[..., :1], -math.inf)
    seen = logits.masked_fill(later, -math.inf)
    lse = seen.logsumexp(-1, keepdim=True)
    others = seen.masked_fill(always, -math.inf)
    ordered = others.sort(-1, descending=True)[0]
    always_share = (seen - lse).exp().masked_fill(~always, 0).sum(-1, keepdim=True)
    before = always_share + F.pad((ordered - lse).exp().cumsum(-1)[..., :-1], (1, 0))
    # A key is read if the keys before it do not have the share. Written so that a NaN reads.
    count = (~(before >= p)).sum(-1, keepdim=True)
    least = F.pad(ordered, (1, 0), value=math.inf).gather(-1, count)
    largest = others.masked_fill(others >= least, -math.inf).amax(-1, keepdim=True)
    between = (least + largest) / 2
    # Neighbouring numbers have none between them.
    between = torch.where(between > largest, between, least)
    return between.masked_fill(largest == -math.inf, -math.inf)


def _unread(logits: Tensor, threshold: Tensor, chunk: _Chunk, union: bool) -> Tensor:
    """bool, of the logits' shape: the keys that a row does not read."""
    below = logits < threshold
    if union:
        below = below.all(2, keepdim=True)
    return chunk.later | (below & ~chunk.always)


def _chunks(query: Tensor, choice: Choice, documents: tuple[Document, ...]) -> Iterator[_Chunk]:
    """Chunks of about ``CHUNK_ELEMENTS`` logits, and at least one row, which start with their document."""
    heads = query.shape[0] * query.shape[1]
    for row, rows, position, key in documents:
        stop = rows
        # From the last row on, which sees the most keys.
        while stop:
            keys = position + stop
            begin = max(0, stop - max(1, CHUNK_ELEMENTS // (heads * keys)))
            place = torch.arange(position + begin, keys, device=query.device)[:, None]
            column = torch.arange(keys, device=query.device)
            later = column > place
            always = ((column < choice.sinks) | (column > place - choice.window)) & ~later
            yield _Chunk(slice(row + begin, row + stop), slice(key, key + keys), later, always)
            stop = begin


def _logits(rows: Tensor, keys: Tensor) -> Tensor:
    """``[B, Hkv, group, R, C]`` of ``[B, Hkv, group, R, D]`` and ``[B, Hkv, C, D]``."""
    return (rows.flatten(2, 3) @ keys.mT).unflatten(2, rows.shape[2:4])


def _product(weights: Tensor, keys: Tensor) -> Tensor:
    """``[B, Hkv, group, R, D]`` of ``[B, Hkv, group, R, C]`` and ``[B, Hkv, C, D]``. Where a weight is 0, not even a
    NaN is read."""
    lines = weights.flatten(2, 3)
    finite = keys.isfinite()
    if finite.all():
        product = lines @ keys
    else:
        reads = (lines != 0).to(keys.dtype) @ (~finite).to(keys.dtype)
        product = (lines @ keys.masked_fill(~finite, 0)).masked_fill(reads > 0, math.nan)
    return product.unflatten(2, weights.shape[2:4])


def _rows(source: Tensor, chunk: _Chunk, key: Tensor) -> Tensor:
    """A chunk's rows of ``[B, Hq, N]`` or ``[B, Hq, N, E]`` as ``[B, Hkv, group, R, E]``, fp32 or fp64; ``E`` is 1
    where there is none."""
    part = source[:, :, chunk.rows].to(torch.promote_types(source.dtype, torch.float32))
    part = part if part.dim() == 4 else part[..., None]
    return part.unflatten(1, (key.shape[1], -1))


def _keys(source: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    return source[:, :, chunk.keys].to(dtype)


def _write(target: Tensor, chunk: _Chunk, rows: Tensor) -> None:
    part = target[:, :, chunk.rows]
    part.copy_(rows.reshape(part.shape))
