"""The step in plain PyTorch: the definition, and the path on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.sparsek_decode.slots import EMPTY, SparseKSlots
from sparsetrain_kernels.sparsek_projection import sparsek_threshold


def buffer_threshold(buffer: Tensor, topk: int) -> Tensor:
    """The threshold of the scores ``[..., C]``, found in fp64; -inf where no more than ``topk`` of them are finite."""
    return sparsek_threshold(buffer.double(), topk, mask=buffer > -torch.inf).to(buffer.dtype)


def update(key: Tensor, value: Tensor, scores: Tensor, slots: SparseKSlots, topk: int, window: int, sinks: int) -> None:
    """Take one token a text into ``slots``; ``key, value [B, H, 1, D]`` and ``scores [B, Hs, 1]`` are its own."""
    position, places = slots.read[:, :, None], slice(sinks, sinks + topk)
    ring = sinks + topk + position % window
    competes = position - window >= sinks

    score = slots.scores.gather(2, ring)
    lowest = slots.scores[:, :, places].amin(2, keepdim=True)
    tied = slots.scores[:, :, places] <= lowest
    oldest = slots.positions[:, :, places].masked_fill(~tied, torch.iinfo(torch.int64).max)
    loser = oldest.argmin(2, keepdim=True) + sinks
    wins = competes & (score >= lowest)
    for tensor in (slots.keys, slots.values, slots.scores, slots.positions):
        _move(tensor, ring, loser, wins)

    least, at = slots.buffer.min(2, keepdim=True)
    slots.buffer.scatter_(2, at, torch.where(competes & (score > least), score, least))
    slots.threshold.copy_(buffer_threshold(slots.buffer, topk))

    target = torch.where(position < sinks, position, ring)
    slots.scores.scatter_(2, target, scores)
    slots.positions.scatter_(2, target, position)
    for tensor, new in ((slots.keys, key), (slots.values, value)):
        tensor.scatter_(2, _wide(target, new), new)
    slots.read.add_(1)


def attend(
    query: Tensor, slots: SparseKSlots, topk: int, sinks: int, gate: str, scale: float, kept: Tensor | None
) -> Tensor:
    """Attention of ``query [B, Hq, 1, D]`` to what the slots hold, or to those ``kept``, accumulated in fp32."""
    batch, query_heads, _, width = query.shape
    heads, wide = slots.keys.shape[1], slots.scores.dtype
    grouped = query.reshape(batch, heads, query_heads // heads, width).to(wide)
    logits = grouped @ slots.keys.to(wide).transpose(2, 3) * scale
    logits = logits.masked_fill(slots.positions[:, :, None] == EMPTY, -torch.inf)
    values = slots.values.to(wide)
    if kept is not None:
        logits = logits.masked_fill(~kept[:, :, None], -torch.inf)
        values = values.masked_fill(~kept[..., None], 0.0)
    gates = _gates(slots, topk, sinks)[:, :, None]
    if gate == "log":
        logits = logits + gates.log()
    weights = logits.softmax(dim=-1)
    if gate == "value":
        weights = weights * gates
    return (weights @ values).reshape(query.shape).to(query.dtype)


def _gates(slots: SparseKSlots, topk: int, sinks: int) -> Tensor:
    """``clip(score - threshold, 0, 1)`` of the selected tokens, 1 in the other slots: ``[B, Hs, slots]``."""
    selected = slice(sinks, sinks + topk)
    held = slots.positions[:, :, selected] != EMPTY
    above = slots.scores[:, :, selected].masked_fill(~held, 0.0) - slots.threshold[..., None]
    gates = torch.ones_like(slots.scores)
    gates[:, :, selected] = above.clamp(0.0, 1.0)
    return gates


def _wide(index: Tensor, tensor: Tensor) -> Tensor:
    """An index over slots ``[B, Hs, M]`` as it gathers from ``tensor``, ``[B, Hs, slots]`` or ``[B, H, slots, D]``."""
    if tensor.dim() == 3:
        return index
    batch, heads, _, width = tensor.shape
    return index[..., None].expand(batch, heads if index.shape[1] == 1 else -1, -1, width)


def _move(tensor: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> None:
    """Copy slot ``source`` to slot ``target`` where ``wanted``; all ``[B, Hs, 1]``."""
    source, target = _wide(source, tensor), _wide(target, tensor)
    wanted = wanted if tensor.dim() == 3 else wanted[..., None]
    tensor.scatter_(2, target, torch.where(wanted, tensor.gather(2, source), tensor.gather(2, target)))
