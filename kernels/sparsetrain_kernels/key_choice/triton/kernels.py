"""The kernel that weighs the keys of chosen rows."""

import triton
import triton.language as tl

from sparsetrain_kernels.dense.triton.rows import bounds_of_tile, keys_of_rows

LEAST = tl.constexpr(-65504.0)
"""Of fp16: a weight's logarithm that is less still is that of a key."""


@triton.jit(do_not_specialize=["first_row", "part_rows"])
def log_weights_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    weights_ptr,
    positions_ptr,
    doc_start_ptr,
    tiles_ptr,
    query_stride_h,
    query_stride_n,
    key_stride_h,
    key_stride_n,
    rows,
    keys,
    first_row,
    part_rows,
    tiles,
    pieces,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    BEST: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_M`` rows, all heads of a group, over ``STEPS`` tiles of keys. Grid: pieces of ``STEPS`` key tiles
    fastest, then KV heads, then tiles of rows.

    Writes fp16 ``[heads, part_rows, keys]`` for ``part_rows`` rows from ``first_row`` on: of each KV head the
    largest of its group's, with ``BEST``, or of each query head. Columns count from the document's start; those behind
    a row's own position are not written.
    """
    piece = tl.program_id(0) % pieces
    kv_head = (tl.program_id(0) // pieces % KV_HEADS).to(tl.int64)
    tile = tl.program_id(0) // pieces // KV_HEADS
    first, end = bounds_of_tile(tiles_ptr, tile, part_rows, BLOCK_M, PACKED)
    if not PACKED:
        first += first_row
        end += first_row
    if first >= end:
        return
    _row, is_row, position, start, _whole, last = keys_of_rows(
        positions_ptr, doc_start_ptr, first, end, BLOCK_M, BLOCK_N, PACKED
    )
    low = start + piece * (STEPS * BLOCK_N)
    if low > last:
        return
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
    weights_ptr += (kv_head * HEADS * part_rows + first - first_row) * keys
    # 32-bit offsets within a tile, a 64-bit start for each.
    cells = line[:, None] * keys + column[None, :]
    for i in tl.range(0, tl.minimum(tl.cdiv(last + 1 - low, BLOCK_N), STEPS)):
        at = low + i * BLOCK_N
        index = at + column
        key = tl.load(
            key_ptr + at.to(tl.int64) * key_stride_n + key_cells,
            mask=(index <= last)[None, :] & (dim < D)[:, None],
            other=0.0,
        )
        best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        for member in tl.range(0, GROUP):
            wide = tl.cast(member, tl.int64)
            query = tl.load(query_ptr + wide * query_stride_h + query_cells, mask=is_query, other=0.0)
            lse = tl.load(lse_ptr + wide * rows + line, mask=is_row, other=0.0)
            weight = tl.maximum(tl.dot(query, key, input_precision=PRECISION) * scale - lse[:, None], LEAST)
            if BEST:
                best = tl.maximum(best, weight)
            else:
                to = weights_ptr + wide * part_rows * keys + (at - start) + cells
                is_seen = is_row[:, None] & (index[None, :] <= position[:, None])
                tl.store(to, weight.to(tl.float16), mask=is_seen)
        if BEST:
            is_seen = is_row[:, None] & (index[None, :] <= position[:, None])
            tl.store(weights_ptr + (at - start) + cells, best.to(tl.float16), mask=is_seen)
