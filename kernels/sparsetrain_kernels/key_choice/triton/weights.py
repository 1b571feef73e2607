"""The kernel that weighs the keys of chosen rows."""

import triton
import triton.language as tl

from sparsetrain_kernels.dense.triton.rows import bounds_of_tile, keys_of_rows
from sparsetrain_kernels.key_choice.triton.lists import SPAN

LEAST = tl.constexpr(-65504.0)
"""Of fp16: a weight's logarithm that is less still is that of a key."""


@triton.jit(do_not_specialize=["first_row", "part_rows"])
def log_weights_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    weights_ptr,
    peaks_ptr,
    positions_ptr,
    doc_start_ptr,
    tiles_ptr,
    query_stride_h,
    query_stride_n,
    key_stride_h,
    key_stride_n,
    rows,
    weights_stride_n,
    peaks_stride_n,
    first_row,
    part_rows,
    tiles,
    shares,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEST: tl.constexpr,
    HELD: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_M`` rows, all heads of a group, over a share of the tiles of keys that they see. Grid: shares fastest,
    then KV heads, then tiles of rows.

    Writes fp16 ``[heads, part_rows, weights_stride_n]`` for ``part_rows`` rows from ``first_row`` on: of each KV head
    the largest of its group's, with ``BEST``, or of each query head. Columns count from the document's start, and
    ``weights_stride_n`` is a multiple of ``BLOCK_N``; those behind a row's own position mean nothing. With ``BEST``
    also the largest of every ``SPAN`` columns up to the row's position, fp16 ``[KV heads, part_rows,
    peaks_stride_n]``. With ``HELD`` the queries of all heads stay in shared memory.
    """
    share = tl.program_id(0) % shares
    kv_head = (tl.program_id(0) // shares % KV_HEADS).to(tl.int64)
    tile = tl.program_id(0) // shares // KV_HEADS
    first, end = bounds_of_tile(tiles_ptr, tile, part_rows, BLOCK_M, PACKED)
    if not PACKED:
        first += first_row
        end += first_row
    if first >= end:
        return
    _row, is_row, position, start, whole, last = keys_of_rows(
        positions_ptr, doc_start_ptr, first, end, BLOCK_M, BLOCK_N, PACKED
    )
    key_tiles = tl.cdiv(last + 1 - start, BLOCK_N)
    own = tl.cdiv(key_tiles, shares)
    dim = tl.arange(0, D_PAD)
    column = tl.arange(0, BLOCK_N)
    line = tl.arange(0, BLOCK_M)
    is_query = is_row[:, None] & (dim < D)[None, :]
    query_ptr += kv_head * GROUP * query_stride_h + first.to(tl.int64) * query_stride_n
    query_cells = line[:, None] * query_stride_n + dim[None, :]
    lse_ptr += kv_head * GROUP * rows + first
    key_ptr += kv_head * key_stride_h
    key_cells = column[None, :] * key_stride_n + dim[:, None]
    HEADS: tl.constexpr = 1 if BEST else GROUP
    place = kv_head * HEADS * part_rows + first - first_row
    weights_ptr += place * weights_stride_n
    peaks_ptr += place * peaks_stride_n
    # 32-bit offsets within a tile, a 64-bit start for each.
    cells = line[:, None] * weights_stride_n + column[None, :]
    peak_cells = line[:, None] * peaks_stride_n + tl.arange(0, BLOCK_N // SPAN)[None, :]
    if HELD:
        queries = ()
        lses = ()
        for member in tl.static_range(GROUP):
            own_ptr = query_ptr + tl.full([], member, tl.int64) * query_stride_h
            queries += (tl.load(own_ptr + query_cells, mask=is_query, other=0.0),)  # type: ignore[assignment]
            lses += (tl.load(lse_ptr + member * rows + line, mask=is_row, other=0.0),)  # type: ignore[assignment]
    for i in tl.range(share * own, tl.minimum(share * own + own, key_tiles)):
        wide = (start + i * BLOCK_N).to(tl.int64)
        is_key = start + i * BLOCK_N + column <= last
        key = tl.load(key_ptr + wide * key_stride_n + key_cells, mask=is_key[None, :] & (dim < D)[:, None], other=0.0)
        to = weights_ptr + i * BLOCK_N
        best = tl.full([BLOCK_M, BLOCK_N], LEAST, tl.float32)
        if HELD:
            for member in tl.static_range(GROUP):
                weight = tl.dot(queries[member], key, input_precision=PRECISION) * scale - lses[member][:, None]
                best = tl.maximum(best, weight)
        else:
            for member in tl.range(0, GROUP):
                another = tl.cast(member, tl.int64)
                query = tl.load(query_ptr + another * query_stride_h + query_cells, mask=is_query, other=0.0)
                lse = tl.load(lse_ptr + another * rows + line, mask=is_row, other=0.0)
                weight = tl.dot(query, key, input_precision=PRECISION) * scale - lse[:, None]
                if BEST:
                    best = tl.maximum(best, weight)
                else:
                    weight = tl.maximum(weight, LEAST).to(tl.float16)
                    tl.store(to + another * part_rows * weights_stride_n + cells, weight, mask=is_row[:, None])
        if BEST:
            if i >= whole:
                seen = start + i * BLOCK_N + column
                best = tl.where(seen[None, :] <= position[:, None], best, float("-inf"))
            # The mask is one of rows, so that many numbers are stored at a time.
            tl.store(to + cells, best.to(tl.float16), mask=is_row[:, None])
            peak = tl.max(tl.reshape(best, [BLOCK_M, BLOCK_N // SPAN, SPAN]), 2)
            tl.store(peaks_ptr + i * (BLOCK_N // SPAN) + peak_cells, peak.to(tl.float16), mask=is_row[:, None])
