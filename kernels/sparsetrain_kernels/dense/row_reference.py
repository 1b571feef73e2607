"""Causal attention of chosen rows in plain PyTorch: some rows at a time, each over all keys up to its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.dense.row_inputs import RowInputs
from sparsetrain_kernels.gather import CHUNK_ELEMENTS
from sparsetrain_kernels.masked import masked_attention


class _Chunk(NamedTuple):
    """Consecutive rows of a document, and the keys up to the last one's."""

    rows: slice
    keys: slice
    hidden: Tensor
    """bool ``[rows, keys]``: later keys."""


def row_forward(inputs: RowInputs) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, P, D]``, laid out like the query, and ``lse [B, Hq, P]``, fp32 (fp64 for fp64 inputs)."""
    query, key, value = inputs[:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    kv_heads = key.shape[1]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for rows, keys, hidden in _chunks(inputs):
            logits = _rows(query, rows, kv_heads, dtype) * inputs.scale @ key[:, :, keys].to(dtype).mT
            logits.unflatten(2, (-1, hidden.shape[0])).masked_fill_(hidden, float("-inf"))
            peak = logits.amax(-1, keepdim=True)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            _write(out, rows, weights @ value[:, :, keys].to(dtype) / total)
            _write(lse, rows, peak + total.log())
    return out, lse


def row_backward(
    inputs: RowInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them; the same bit for bit on every run."""
    query, key, value = inputs[:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    kv_heads = key.shape[1]
    # The softmax's backward: grad_logits = weights * (grad_weights - delta).
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros(key.shape, dtype=dtype, device=key.device) for _ in range(2))
    with torch.autocast(query.device.type, enabled=False):
        for rows, keys, hidden in _chunks(inputs):
            queries = _rows(query, rows, kv_heads, dtype) * inputs.scale
            grads = _rows(grad_out, rows, kv_heads, dtype)
            some_keys = key[:, :, keys].to(dtype)
            weights = (queries @ some_keys.mT).sub_(_rows(lse, rows, kv_heads, dtype)).exp_()
            weights.unflatten(2, (-1, hidden.shape[0])).masked_fill_(hidden, 0)
            grad_value[:, :, keys] += weights.mT @ grads
            grad_logits = grads @ value[:, :, keys].to(dtype).mT
            grad_logits.sub_(_rows(delta, rows, kv_heads, dtype)).mul_(weights)
            _write(grad_query, rows, grad_logits @ some_keys * inputs.scale)
            grad_key[:, :, keys] += grad_logits.mT @ queries
    return grad_query, torch.empty_like(key).copy_(grad_key), torch.empty_like(value).copy_(grad_value)


def dense_rows(inputs: RowInputs) -> tuple[Tensor, Tensor]:
    """Builds the whole mask: the definition of the operation."""
    visible = torch.zeros(inputs.query.shape[2], inputs.key.shape[2], dtype=torch.bool)
    for start, first, places in inputs.by_document():
        for row, place in enumerate(places, first):
            visible[row, start : place + 1] = True
    return masked_attention(*inputs[:3], visible.to(inputs.query.device), scale=inputs.scale)


def pairs_seen(inputs: RowInputs) -> int:
    """Pairs of a row and a key that it sees, of one head; as many as there may be where nothing has a value."""
    if isinstance(inputs.query_positions, torch._subclasses.FakeTensor):
        return inputs.query.shape[2] * inputs.key.shape[2]
    return sum(place - start + 1 for start, _, places in inputs.by_document() for place in places)


def _chunks(inputs: RowInputs) -> Iterator[_Chunk]:
    """Chunks of about ``CHUNK_ELEMENTS`` logits, and at least one row; a document's own keys decide."""
    heads = inputs.query.shape[0] * inputs.query.shape[1]
    for start, first, places in inputs.by_document():
        stop = len(places)
        # From the last row on, which sees the most keys.
        while stop:
            keys = places[stop - 1] + 1 - start
            begin = max(0, stop - max(1, CHUNK_ELEMENTS // (heads * keys)))
            place = torch.tensor(places[begin:stop], device=inputs.query.device)
            hidden = torch.arange(start, start + keys, device=place.device) > place[:, None]
            yield _Chunk(slice(first + begin, first + stop), slice(start, start + keys), hidden)
            stop = begin


def _rows(source: Tensor, rows: slice, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of ``[B, Hq, P]`` or ``[B, Hq, P, E]`` as ``[B, Hkv, group * rows, E]``; ``E`` is 1 where there is none."""
    part = source[:, :, rows].to(dtype)
    part = part if part.dim() == 4 else part[..., None]
    return part.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _write(target: Tensor, rows: slice, tiles: Tensor) -> None:
    part = target[:, :, rows]
    part.copy_(tiles.reshape(part.shape))
