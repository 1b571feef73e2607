"""What the kernels walk: tiles of rows, and the keys of each segment as one ascending list; both made on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.documents import known_bounds
from sparsetrain_kernels.key_lists.triton.tiles import FIELDS
from sparsetrain_kernels.launching import launch, next_power_of_2
from sparsetrain_kernels.listed_keys.inputs import ListedInputs

SCAN = 1024
"""Segments, or entries of a list, that one step looks at."""
RANKED = tl.constexpr(64)
"""Entries that are compared with as many others at a time, where a list does not ascend."""


class Work(NamedTuple):
    """What the rows of a call read."""

    tiles: Tensor
    """int32 ``[most, FIELDS]``: tiles of up to ``rows`` rows of one segment, ascending; empty ones at the end."""
    keys: Tensor
    """int32 ``[B, Hkv, segments, capacity]``: rows of the keys, ascending: sinks, then what is read of the list."""
    counts: Tensor
    """int32 ``[B, Hkv, segments]``."""
    starts: Tensor | None
    """Of each row's document, the first row, int32 ``[N]``; None where there is one document."""
    ends: Tensor | None
    """And the row past its last."""


def make_work(inputs: ListedInputs, rows: int) -> Work:
    """For tiles of ``rows`` rows."""
    query, cu_seqlens = inputs.query, inputs.cu_seqlens
    tokens, device = query.shape[2], query.device
    starts, ends = (None, None) if cu_seqlens is None else known_bounds(tokens, cu_seqlens, device)
    batch, heads, segments, listed = inputs.lists.shape
    most = tokens // rows + segments
    tiles = torch.empty((most, int(FIELDS)), dtype=torch.int32, device=device)
    launch(
        segment_tiles_kernel,
        1,
        (inputs.cu_segments, inputs.skip, starts, tiles),
        (tokens, segments, inputs.window, most),
        ROWS=rows,
        PACKED=starts is not None,
        SCAN=SCAN,
    )
    capacity = inputs.sinks + listed * inputs.granule
    keys = torch.empty((batch, heads, segments, capacity), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, segments), dtype=torch.int32, device=device)
    launch(
        ascending_keys_kernel,
        batch * heads * segments,
        (inputs.lists, inputs.counts, inputs.cu_segments, inputs.skip, starts, keys, counts),
        (tokens, segments, listed, capacity, inputs.window, inputs.sinks),
        GRANULE=inputs.granule,
        PACKED=starts is not None,
        SCAN=min(SCAN, max(64, next_power_of_2(listed * inputs.granule))),
    )
    return Work(tiles, keys, counts, starts, ends)


@triton.jit
def segment_bounds(cu_ptr, skip_ptr, doc_start_ptr, segment, segments, tokens, window, PACKED: tl.constexpr):
    """Of segments: the first row that is computed, the row past the last, the first key of their own range, and the
    first row of their document. Segments that do not exist are empty."""
    exists = segment < segments
    begin = tl.load(cu_ptr + segment, mask=exists, other=0)
    end = tl.load(cu_ptr + segment + 1, mask=exists, other=0)
    first = tl.minimum(begin + tl.load(skip_ptr + segment, mask=exists, other=0), end)
    document = tl.zeros_like(begin)
    if PACKED:
        document = tl.load(doc_start_ptr + begin, mask=exists & (begin < tokens), other=0)
    return first, end, tl.maximum(first - window, document), document


@triton.jit
def segment_tiles_kernel(
    cu_ptr,
    skip_ptr,
    doc_start_ptr,
    tiles_ptr,
    tokens,
    segments,
    window,
    most,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    SCAN: tl.constexpr,
):
    """All tiles, in one program."""
    so_far = 0
    for start in range(0, segments, SCAN):
        segment = start + tl.arange(0, SCAN)
        first, end, low, _document = segment_bounds(
            cu_ptr, skip_ptr, doc_start_ptr, segment, segments, tokens, window, PACKED
        )
        count = tl.cdiv(end - first, ROWS)
        place = so_far + tl.cumsum(count, 0) - count
        for i in range(0, tl.max(count, 0)):
            row = first + i * ROWS
            cell = tiles_ptr + (place + i) * FIELDS
            is_tile = (i < count) & (place + i < most)
            tl.store(cell, segment, mask=is_tile)
            tl.store(cell + 1, row, mask=is_tile)
            tl.store(cell + 2, tl.minimum(row + ROWS, end), mask=is_tile)
            tl.store(cell + 3, low, mask=is_tile)
        so_far += tl.sum(count, 0)
    for start in range(so_far, most, SCAN):
        tile = start + tl.arange(0, SCAN)
        for field in tl.static_range(FIELDS):
            # Past all rows, as if they came after all others, and empty.
            tl.store(tiles_ptr + tile * FIELDS + field, 0 if field == 0 else tokens, mask=tile < most)


@triton.jit
def _entries(list_ptr, place, until, low, sinks, GRANULE: tl.constexpr):
    """The keys at places of a list, counted from the document's start, and which of them are read."""
    inside = place < until
    key = tl.load(list_ptr + place // GRANULE, mask=inside, other=0) * GRANULE + place % GRANULE
    return key, inside & (key >= sinks) & (key < low)


@triton.jit
def ascending_keys_kernel(
    lists_ptr,
    counts_ptr,
    cu_ptr,
    skip_ptr,
    doc_start_ptr,
    keys_ptr,
    key_counts_ptr,
    tokens,
    segments,
    listed,
    capacity,
    window,
    sinks,
    GRANULE: tl.constexpr,
    PACKED: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The keys of one segment and KV head. Grid: segments fastest, then heads and the batch."""
    place = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(0) % segments
    _first, _end, low, document = segment_bounds(
        cu_ptr, skip_ptr, doc_start_ptr, segment, segments, tokens, window, PACKED
    )
    low -= document
    lists_ptr += place * listed
    keys_ptr += place * capacity
    until = tl.minimum(tl.load(counts_ptr + place), listed) * GRANULE
    always = tl.minimum(sinks, low)
    for start in range(0, always, SCAN):
        key = start + tl.arange(0, SCAN)
        tl.store(keys_ptr + key, key + document, mask=key < always)
    seen = always
    falls = 0
    for start in range(0, until, SCAN):
        at = start + tl.arange(0, SCAN)
        key, is_read = _entries(lists_ptr, at, until, low, sinks, GRANULE)
        before, _read = _entries(lists_ptr, tl.maximum(at - 1, 0), until, low, sinks, GRANULE)
        falls += tl.sum(((at < until) & (key < before)).to(tl.int32), 0)
        ones = is_read.to(tl.int32)
        tl.store(keys_ptr + seen + tl.cumsum(ones, 0) - ones, key + document, mask=is_read)
        seen += tl.sum(ones, 0)
    tl.store(key_counts_ptr + place, seen)
    if falls > 0:
        # The place of a key is the number of those that come before it.
        tl.debug_barrier()
        for start in range(0, until, RANKED):
            at = start + tl.arange(0, RANKED)
            key, is_read = _entries(lists_ptr, at, until, low, sinks, GRANULE)
            rank = tl.zeros([RANKED], tl.int32)
            for other_start in range(0, until, RANKED):
                other_at = other_start + tl.arange(0, RANKED)
                other, other_is_read = _entries(lists_ptr, other_at, until, low, sinks, GRANULE)
                before = (other[None, :] < key[:, None]) | (
                    (other[None, :] == key[:, None]) & (other_at[None, :] < at[:, None])
                )
                rank += tl.sum((before & other_is_read[None, :]).to(tl.int32), 1)
            tl.store(keys_ptr + always + rank, key + document, mask=is_read)
