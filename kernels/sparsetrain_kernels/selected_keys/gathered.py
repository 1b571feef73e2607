"""Attention over a SparseK selection on the keys that are read, tile by tile: memory linear in the length.

A tile of consecutive rows of a document reads its window, one range of keys, and the selected keys before it. Those are
carried from tile to tile: a key joins when it has left the window of the tile's first row and goes for good when it
leaves the selection, so that at most ``sinks + topk + TILE`` are carried and the work grows linearly too. Backward
recomputes each tile from the saved log-sum-exp.

Tiles start with their document: a packed document is computed exactly like one alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.inputs import Document
from sparsetrain_kernels.key_lists.gathered import Chunk, attend, attend_backward
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs

TILE = 128
"""Rows at a time: enough for the products of a window of keys to be large."""


def gathered_forward(inputs: SelectedInputs) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, N, D]``, laid out like the query, and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs)."""
    return attend(*inputs[:3], inputs.scale, _tiles(inputs), inputs.gate)


def gathered_backward(inputs: SelectedInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, laid out like them, and of scores and threshold, ``[B, Hs, N]``; the same
    bit for bit on every run."""
    results = (out, lse, grad_out, None)
    selections = inputs.scores.shape[1]
    return attend_backward(*inputs[:3], inputs.scale, _tiles(inputs), results, inputs.gate, selections)


def _tiles(inputs: SelectedInputs) -> Iterator[Chunk]:
    for document in inputs.documents():
        yield from _document_tiles(inputs, document)


def _document_tiles(inputs: SelectedInputs, document: Document) -> Iterator[Chunk]:
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


def _tile(inputs: SelectedInputs, start: int, rows: Tensor, keys: Tensor, used: Tensor, exits: Tensor) -> Chunk:
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
    # One tile, and alike for the heads of a group.
    hidden, gates, interior = (pairs[:, :, None, None] for pairs in (~seen, gates, interior))
    return Chunk(start + rows[None], None, (start + keys).unsqueeze(2), hidden, gates, interior)
