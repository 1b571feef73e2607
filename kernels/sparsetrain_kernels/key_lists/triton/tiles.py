"""What the kernels walk, and how: tiles of lines, each with a list of keys and a range of neighbouring ones.

A line is a row of one query head. A tile has rows of one head, or of all heads of a group, one after another the heads
of a row. All its lines read one list, of which every line sees the first keys. The neighbouring keys end with the
tile's last row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

FIELDS = tl.constexpr(4)
"""Numbers of a tile: its list, its first row, the row past its last, and the first of its neighbouring keys."""


class KeyLists(NamedTuple):
    """What rows read, made on the device."""

    keys: Tensor
    """int32 ``[B, Hs, lists, capacity]``: rows of the keys; ``Hs`` is the number of KV heads, or 1 for all of them."""
    counts: Tensor
    """int32 ``[B, Hs, lists]``."""
    rows: int
    """Of a selection, how many rows share a list, whole tiles of them; else how many rows a tile has at most."""
    whole: Tensor | None = None
    """int32 ``[B, Hs, lists]``: how many keys all rows see; they come first. None where all rows see all."""
    tiles: Tensor | None = None
    """int32 ``[tiles, FIELDS]``, those without rows at the end; None for a selection, whose tiles are a plain cut."""
    seen: Tensor | None = None
    """int32 like ``keys``: which of a list's rows see a key, the first in the low 16 bits, the one past the last above
    them; None where no kernel reads it."""


@triton.jit
def place_of_program(tiles, heads, GROUP: tl.constexpr, MEMBERS: tl.constexpr, SELECTED: tl.constexpr):
    """Tile, KV head, first query head of the group, and element of the batch of this program. Of a selection all heads
    come fastest: those of a group share their keys, and few tiles at once read the same ones. Else tiles do, so that
    what neighbouring ones read of a KV head stays in L2."""
    shares: tl.constexpr = GROUP // MEMBERS
    share = tl.program_id(0) // shares
    if SELECTED:
        kv_head = share % heads
        tile = share // heads % tiles
        batch = share // heads // tiles
    else:
        tile = share % tiles
        kv_head = share // tiles % heads
        batch = share // tiles // heads
    return tile, kv_head, tl.program_id(0) % shares * MEMBERS, batch.to(tl.int64)


@triton.jit
def read_tile(
    tile,
    tiles_ptr,
    doc_start_ptr,
    tokens,
    window,
    ROWS: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECTED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A tile's list, its first row and the row past its last, the first of its neighbouring keys, and of those that
    every line sees the first and the one past the last.

    Of a selection all follows from the number of the tile, and neighbours are those of the window. Else all neighbours
    are masked.
    """
    if SELECTED:
        first = tile * ROWS
        end = tl.minimum(first + ROWS, tokens)
        low = tl.maximum(first - window + 1, 0)
        low_whole = end - window
        if PACKED:
            low = tl.maximum(low, tl.load(doc_start_ptr + first))
            low_whole = tl.maximum(low_whole, tl.load(doc_start_ptr + end - 1))
        # Less than a block joins the edge, which is masked anyhow, as long as there is one.
        whole = tl.maximum(first + 1 - tl.maximum(low_whole, low), 0) // BLOCK_N * BLOCK_N
        listing, low_whole, high_whole = first // LIST_ROWS, first + 1 - whole, first + 1
    else:
        cell = tiles_ptr + tile * FIELDS
        listing, first, end, low = tl.load(cell), tl.load(cell + 1), tl.load(cell + 2), tl.load(cell + 3)
        low_whole, high_whole = end, end
    return listing, first, end, low, low_whole, high_whole


@triton.jit
def lines_of_tile(first, end, head, MEMBERS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each line of a tile its row, its query head, and whether it exists; ``head`` is the first, int64."""
    line = tl.arange(0, BLOCK_M)
    row = first + line // MEMBERS
    return row, head + line % MEMBERS, (line < ROWS * MEMBERS) & (row < end)


@triton.jit
def masked_keys(
    keys_ptr,
    i,
    n_list,
    n_edge,
    rest,
    listed,
    low,
    low_whole,
    high_whole,
    end,
    first,
    column,
    BLOCK_N: tl.constexpr,
    SELECTED: tl.constexpr,
):
    """Block ``i`` of the keys that some lines do not see: the keys, which of them exist, and whether they are listed
    ones. The list from ``rest`` on first, then the neighbours before and behind those that every line sees. Keys that
    do not exist are the first row's, which is read anyhow."""
    is_listed = i < n_list
    start = low + (i - n_list) * BLOCK_N
    stop = end
    if SELECTED:
        in_edge = i < n_list + n_edge
        start = tl.where(in_edge, start, high_whole + (i - n_list - n_edge) * BLOCK_N)
        stop = tl.where(in_edge, low_whole, end)
    place = tl.where(is_listed, rest + i * BLOCK_N, start) + column
    is_key = place < tl.where(is_listed, listed, stop)
    from_list = tl.load(keys_ptr + place, mask=place < tl.where(is_listed, listed, 0), other=0)
    index = tl.where(is_listed, from_list, place)
    return tl.where(is_key, index, first), is_key, is_listed


@triton.jit
def sees(row, doc_start, index, is_key, is_listed, exit_ptr, window, SELECTED: tl.constexpr):
    """Which of the rows see which of the keys. Of a selection: a listed key from the moment it leaves the window to its
    exit, a key of the window until then, within its document. Else all keys up to the row's own."""
    if SELECTED:
        enter = index + tl.where(is_listed, window, 0)
        leave = tl.where(is_listed, tl.load(exit_ptr + index), index + window)
        leave = tl.where(is_key, leave, -1)
        start = tl.where(is_listed, 0, doc_start)
        visible = (row[:, None] >= enter[None, :]) & (row[:, None] < leave[None, :])
        visible &= index[None, :] >= start[:, None]
    else:
        visible = is_key[None, :] & (index[None, :] <= row[:, None])
    return visible
