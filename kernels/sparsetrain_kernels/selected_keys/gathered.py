"""Attention over a SparseK selection on the keys that are read, tile by tile: memory linear in the length.

A tile of consecutive rows of a document reads its window, one range of keys, and the selected keys before it. Those are
carried from tile to tile: a key joins when it has left the window of the tile's first row and goes for good when it
leaves the selection, so that at most ``sinks + topk + TILE`` are carried and the work grows linearly too. Backward
recomputes each tile from the saved log-sum-exp.

Tiles start with their document: a packed document is computed exactly like one alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.inputs import Document
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs

TILE = 128
"""Rows at a time: enough for the products of a window of keys to be large."""


class _Tile(NamedTuple):
    """``R`` consecutive rows of a document and the ``C`` keys that some of them see."""

    rows: slice
    keys: Tensor
    """``[B, Hs, C]`` rows of ``key``: each at most once, but for unused slots, which repeat the first row's own."""
    hidden: Tensor
    """bool ``[B, Hs, 1, R, C]``: pairs that are not seen."""
    gates: Tensor
    """``[B, Hs, 1, R, C]`` what the forward pass multiplies with; a single 1 for the straight gate."""
    interior: Tensor
    """bool ``[B, Hs, 1, R, C]``: pairs whose gate lies strictly between 0 and 1, the only ones with a gradient."""


def gathered_forward(inputs: SelectedInputs) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, N, D]``, laid out like the query, and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs)."""
    query, key, value = inputs.query, inputs.key.contiguous(), inputs.value.contiguous()
    heads = _Heads(inputs)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=heads.dtype, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for tile in _tiles(inputs):
            logits = heads.read_rows(query, tile) * inputs.scale @ heads.read_keys(key, tile).mT
            logits = heads.by_row(logits)
            if inputs.gate == "log":
                logits += tile.gates.log()
            logits.masked_fill_(tile.hidden, float("-inf"))
            peak = logits.amax(-1, keepdim=True)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            if inputs.gate == "value":
                weights *= tile.gates
            sums = weights.flatten(2, 3) @ heads.read_keys(value, tile)
            heads.write_rows(out, tile, sums / total.flatten(2, 3))
            heads.write_rows(lse, tile, peak + total.log())
    return out, lse


def gathered_backward(inputs: SelectedInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, laid out like them, and of scores and threshold, ``[B, Hs, N]``.

    The same bit for bit on every run: no two terms of a sum are added at once, on CUDA neither.
    """
    query, key, value = inputs.query, inputs.key.contiguous(), inputs.value.contiguous()
    heads = _Heads(inputs)
    # The softmax's backward: grad_logits = weights * (grad_weights - delta).
    delta = (grad_out.to(heads.dtype) * out.to(heads.dtype)).sum(-1)
    grad_query, grad_threshold = torch.empty_like(query), torch.empty_like(inputs.threshold)
    grad_key, grad_value = (torch.zeros(key.shape, dtype=heads.dtype, device=key.device) for _ in range(2))
    grad_scores = torch.zeros_like(inputs.scores)
    with torch.autocast(query.device.type, enabled=False):
        for tile in _tiles(inputs):
            queries = heads.read_rows(query, tile) * inputs.scale
            grads = heads.read_rows(grad_out, tile)
            keys = heads.read_keys(key, tile)
            # Without the gate: of the log gate this is the derivative of a weight by its gate, with no division.
            ungated = heads.by_row(queries @ keys.mT - heads.read_rows(lse, tile)).exp_()
            ungated.masked_fill_(tile.hidden, 0)
            heads.add_keys(grad_value, tile, (ungated * tile.gates).flatten(2, 3).mT @ grads)

            grad_weights = heads.by_row(grads @ heads.read_keys(value, tile).mT)
            delta_rows = heads.by_row(heads.read_rows(delta, tile))
            if inputs.gate == "value":
                grad_gates = ungated * grad_weights
                grad_logits = ungated * (grad_weights * tile.gates - delta_rows)
            else:
                grad_gates = ungated * (grad_weights - delta_rows)
                grad_logits = grad_gates * tile.gates
            grad_logits = grad_logits.flatten(2, 3)
            heads.write_rows(grad_query, tile, grad_logits @ keys * inputs.scale)
            heads.add_keys(grad_key, tile, grad_logits.mT @ queries)

            grad_gates = heads.by_selection(grad_gates.masked_fill(~tile.interior, 0).sum(2))
            heads.add_keys(grad_scores, tile, grad_gates.sum(2))
            grad_threshold[:, :, tile.rows] = -grad_gates.sum(3)
    laid_out = (torch.empty_like(like).copy_(g) for like, g in ((inputs.key, grad_key), (inputs.value, grad_value)))
    return grad_query, *laid_out, grad_scores, grad_threshold


def _tiles(inputs: SelectedInputs) -> Iterator[_Tile]:
    for document in inputs.documents():
        yield from _document_tiles(inputs, document)


def _document_tiles(inputs: SelectedInputs, document: Document) -> Iterator[_Tile]:
    """Rows and keys count from the document's start here."""
    start, length = document.row, document.rows
    position = torch.arange(length, device=inputs.query.device)
    exits = inputs.exit[:, :, start : start + length] - start
    carried = torch.empty((*exits.shape[:2], 0), dtype=torch.int64, device=position.device)
    joined = 0
    for first in range(0, length, TILE):
        rows, near = position[first : first + TILE], max(0, first - inputs.window + 1)
        carried = torch.cat((carried, position[joined:near].expand(*exits.shape[:2], -1)), 2)
        joined = near
        # Those that stay come first; the heads keep as many slots as the one with the most.
        stays, order = (exits.gather(2, carried) > first).sort(dim=2, descending=True, stable=True)
        most = int(stays.sum(2).amax()) if near else 0
        stays, carried = stays[..., :most], carried.gather(2, order[..., :most])
        # What has left is hidden, but its weight of zero multiplies: it must be a key that a row here does see.
        within = position[near : first + len(rows)].expand(*exits.shape[:2], -1)
        keys = torch.cat((torch.where(stays, carried, first), within), 2)
        used = F.pad(stays, (0, within.shape[2]), value=True)
        yield _tile(inputs, start, rows, keys, used, exits.gather(2, keys))


def _tile(inputs: SelectedInputs, start: int, rows: Tensor, keys: Tensor, used: Tensor, exits: Tensor) -> _Tile:
    """The tile of ``rows [R]`` and ``keys [B, Hs, C]``, of which ``used`` are no empty slots."""
    row, key = rows[:, None], keys.unsqueeze(2)
    near = row - key < inputs.window
    always = near | (key < inputs.sinks)
    seen = used.unsqueeze(2) & (key <= row) & (near | (row < exits.unsqueeze(2)))
    first = start + int(rows[0])
    within = slice(first, first + len(rows))
    gates = inputs.scores.gather(2, start + keys).unsqueeze(2) - inputs.threshold[:, :, within].unsqueeze(3)
    interior = seen & ~always & (gates > 0) & (gates < 1)
    gates = gates.clamp(0, 1).masked_fill(always, 1)
    if inputs.gate == "log":
        seen &= gates > 0
    elif inputs.gate == "straight":
        gates = torch.ones_like(gates[..., :1, :1])
    return _Tile(within, start + keys, ~seen.unsqueeze(2), gates.unsqueeze(2), interior.unsqueeze(2))


class _Heads:
    """Moves rows and keys between their tensors and the batched products of a tile, ``[B, Hkv, G * R, ...]``: query
    heads that share a KV head are rows of the same product, so keys are never repeated."""

    def __init__(self, inputs: SelectedInputs) -> None:
        self.kv_heads = inputs.key.shape[1]
        self.group = inputs.query.shape[1] // self.kv_heads
        self.shared = inputs.scores.shape[1] == 1
        self.dtype = torch.promote_types(inputs.query.dtype, torch.float32)

    def by_row(self, tiles: Tensor) -> Tensor:
        """``[B, Hkv, G * R, E]`` seen as ``[B, Hkv, G, R, E]``."""
        return tiles.unflatten(2, (self.group, -1))

    def by_selection(self, sums: Tensor) -> Tensor:
        """``[B, Hkv, R, C]`` as ``[B, Hs, R, C]``: KV heads that share a selection are added."""
        return sums.sum(1, keepdim=True) if self.shared else sums

    def read_rows(self, source: Tensor, tile: _Tile) -> Tensor:
        """Rows of ``[B, Hq, N]`` or ``[B, Hq, N, E]``, in the compute dtype; ``E`` is 1 where there is none."""
        rows = source[:, :, tile.rows].to(self.dtype)
        width = rows.shape[3] if rows.dim() == 4 else 1
        return rows.reshape(rows.shape[0], self.kv_heads, self.group * rows.shape[2], width)

    def write_rows(self, target: Tensor, tile: _Tile, tiles: Tensor) -> None:
        rows = target[:, :, tile.rows]
        rows.copy_(tiles.reshape(rows.shape))

    def read_keys(self, source: Tensor, tile: _Tile) -> Tensor:
        """The tile's rows of ``[B, Hkv, N, D]``, ``[B, Hkv, C, D]``, in the compute dtype."""
        # An embedding lookup is the fastest gather of rows torch has on CPU.
        return F.embedding(_flat_rows(source, tile), source.view(-1, source.shape[-1])).to(self.dtype)

    def add_keys(self, target: Tensor, tile: _Tile, tiles: Tensor) -> None:
        """Add to the tile's rows of ``[B, H, N, ...]``. Unused slots, whose row is there twice, add zeros."""
        index = _flat_rows(target, tile).flatten()
        target.view(-1, *target.shape[3:]).index_add_(0, index, tiles.reshape(-1, *target.shape[3:]))


def _flat_rows(tensor: Tensor, tile: _Tile) -> Tensor:
    """Where the tile's keys lie in the flattened ``[B * H * N, ...]``, ``[B, H, C]``; a selection may be shared."""
    batch, heads, tokens = tensor.shape[:3]
    pair = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1)
    return pair * tokens + tile.keys
