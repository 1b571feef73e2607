"""Attention of rows over the keys that they read, chunk by chunk, in plain PyTorch.

A chunk is some tiles of rows, each with the keys that its rows read. They are gathered and multiplied in one batch;
query heads that share a KV head are rows of the same product, so keys are never repeated. Backward recomputes the
weights from the saved log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunk(NamedTuple):
    """``T`` tiles of at most ``R`` rows each, with ``C`` places for keys."""

    rows: Tensor
    """``[T, R]`` rows of the query."""
    exists: Tensor | None
    """bool ``[T, R]``: places that are used; the others may hold any row. None where all are."""
    keys: Tensor
    """``[B, Hs, T, C]`` rows of the key; ``Hs`` is the number of KV heads, or 1 for all of them. Unused places repeat a
    key that the tile's rows see."""
    hidden: Tensor
    """bool ``[B, Hs, T, 1, R, C]``: pairs that are not seen."""
    gates: Tensor = torch.ones(())
    """``[B, Hs, T, 1, R, C]``: what the forward pass multiplies weights with; not read for the straight gate."""
    interior: Tensor = torch.zeros((), dtype=torch.bool)
    """bool ``[B, Hs, T, 1, R, C]``: pairs whose gate has a gradient; not read if no gate has one."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, chunks: Iterable[Chunk], gate: str = "straight"
) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, N, D]``, laid out like the query, and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs).

    Rows of no chunk have an output of 0 and a log-sum-exp of -inf. ``gate`` says where gates count:
    ``selected_attention`` describes it.
    """
    key, value = key.contiguous(), value.contiguous()
    heads = _Heads(query, key)
    out = torch.zeros_like(query)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=heads.dtype, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for chunk in chunks:
            logits = heads.by_row(heads.read_rows(query, chunk) * scale @ heads.read_keys(key, chunk).mT)
            if gate == "log":
                logits += chunk.gates.log()
            logits.masked_fill_(chunk.hidden, float("-inf"))
            peak = logits.amax(-1, keepdim=True)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            heads.write_rows(lse, chunk, (peak + total.log()).flatten(3, 4))
            if gate == "value":
                weights *= chunk.gates
            sums = weights.flatten(3, 4) @ heads.read_keys(value, chunk)
            heads.write_rows(out, chunk, sums / total.flatten(3, 4))
    return out, lse


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    chunks: Iterable[Chunk],
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    gate: str = "straight",
    selections: int = 0,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, laid out like them; of gates that have some, those of the scores of keys
    and of the thresholds of rows as well, ``[B, Hs, N]``.

    The same bit for bit on every run: the terms of a sum are added in one order, on CUDA too.

    Args:
        results: the output and the log-sum-exp, and the gradients of both; that of the log-sum-exp may be None.
        selections: ``Hs`` where gates have gradients, else 0.
    """
    out, lse, grad_out, grad_lse = results
    laid_out, (key, value) = (key, value), (key.contiguous(), value.contiguous())
    heads = _Heads(query, key)
    # The softmax's backward: grad_logits = weights * (grad_weights - delta).
    delta = (grad_out.to(heads.dtype) * out.to(heads.dtype)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = (torch.zeros(key.shape, dtype=heads.dtype, device=key.device) for _ in range(2))
    shape = (query.shape[0], selections, query.shape[2])
    grad_scores, grad_threshold = (torch.zeros(shape, dtype=heads.dtype, device=key.device) for _ in range(2))
    with torch.autocast(query.device.type, enabled=False):
        for chunk in chunks:
            queries = heads.read_rows(query, chunk) * scale
            grads = heads.read_rows(grad_out, chunk)
            keys = heads.read_keys(key, chunk)
            # Without the gate: of the log gate this is the derivative of a weight by its gate, with no division.
            weights = heads.by_row((queries @ keys.mT).sub_(heads.read_rows(lse, chunk))).exp_()
            weights.masked_fill_(chunk.hidden, 0)
            gated = weights if gate == "straight" else weights * chunk.gates
            heads.add_keys(grad_value, chunk, gated.flatten(3, 4).mT @ grads)

            grad_weights = heads.by_row(grads @ heads.read_keys(value, chunk).mT)
            delta_rows = heads.by_row(heads.read_rows(delta, chunk))
            if gate == "value":
                grad_gates = weights * grad_weights
                grad_logits = weights * (grad_weights * chunk.gates - delta_rows)
            else:
                grad_gates = grad_weights.sub_(delta_rows).mul_(weights)
                grad_logits = grad_gates if gate == "straight" else grad_gates * chunk.gates
            grad_logits = grad_logits.flatten(3, 4)
            heads.write_rows(grad_query, chunk, grad_logits @ keys * scale)
            heads.add_keys(grad_key, chunk, grad_logits.mT @ queries)
            if selections:
                grad_gates = grad_gates.masked_fill(~chunk.interior, 0).sum(3)
                # KV heads that share a selection are added.
                grad_gates = grad_gates if selections == grad_gates.shape[1] else grad_gates.sum(1, keepdim=True)
                heads.add_keys(grad_scores, chunk, grad_gates.sum(3))
                _write(grad_threshold, chunk, -grad_gates.sum(4))
    own = [torch.empty_like(like).copy_(grad) for like, grad in zip(laid_out, (grad_key, grad_value), strict=True)]
    return (grad_query, *own, grad_scores, grad_threshold) if selections else (grad_query, *own)


class _Heads:
    """Moves rows and keys between their tensors and the batched products of a chunk, ``[B, Hkv, T, M, ...]`` with ``M``
    the rows of all query heads that share a KV head."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.kv_heads = key.shape[1]
        self.group = query.shape[1] // self.kv_heads
        self.dtype = torch.promote_types(query.dtype, torch.float32)

    def by_row(self, tiles: Tensor) -> Tensor:
        """``[B, Hkv, T, M, E]`` seen as ``[B, Hkv, T, group, R, E]``."""
        return tiles.unflatten(3, (self.group, -1))

    def read_rows(self, source: Tensor, chunk: Chunk) -> Tensor:
        """Rows of ``[B, Hq, N]`` or ``[B, Hq, N, E]``, in the compute dtype; ``E`` is 1 where there is none."""
        rows = source[:, :, chunk.rows].to(self.dtype)
        rows = (rows if rows.dim() == 5 else rows[..., None]).unflatten(1, (self.kv_heads, self.group))
        return rows.transpose(2, 3).flatten(3, 4)

    def write_rows(self, target: Tensor, chunk: Chunk, tiles: Tensor) -> None:
        """The inverse, of ``[B, Hkv, T, M, E]``."""
        rows = self.by_row(tiles).transpose(2, 3).flatten(1, 2)
        _write(target, chunk, rows if target.dim() == 4 else rows.squeeze(4))

    def read_keys(self, source: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's rows of ``[B, Hkv, N, D]``, ``[B, Hkv, T, C, D]``, in the compute dtype."""
        # An embedding lookup is the fastest gather of rows torch has on CPU.
        return F.embedding(_flat_rows(source, chunk), source.view(-1, source.shape[-1])).to(self.dtype)

    def add_keys(self, target: Tensor, chunk: Chunk, tiles: Tensor) -> None:
        """Add to the chunk's rows of ``[B, H, N, ...]``, each sum in one fixed order: no atomics, on CUDA neither."""
        rows = target.view(-1, *target.shape[3:])
        index, source = _flat_rows(target, chunk).flatten(), tiles.reshape(-1, *target.shape[3:])
        if target.is_cuda:
            rows.index_put_((index,), source, accumulate=True)
        else:
            rows.index_add_(0, index, source)


def _write(target: Tensor, chunk: Chunk, rows: Tensor) -> None:
    """Puts ``[B, H, T, R, ...]`` into ``[B, H, N, ...]``."""
    if chunk.exists is None:
        target[:, :, chunk.rows] = rows.to(target.dtype)
    else:
        target[:, :, chunk.rows[chunk.exists]] = rows[:, :, chunk.exists].to(target.dtype)


def _flat_rows(tensor: Tensor, chunk: Chunk) -> Tensor:
    """Where the chunk's keys lie in the flattened ``[B * H * N, ...]``, ``[B, H, T, C]``; lists may be shared."""
    batch, heads, tokens = tensor.shape[:3]
    pair = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1, 1)
    return pair * tokens + chunk.keys
