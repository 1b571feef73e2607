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
    steps = tl.minimum(tl.cdiv(last + 1 - low, BLOCK_N), STEPS)
    FEW: tl.constexpr = GROUP == 1 or GROUP == 2 or GROUP == 4
    if BEST and FEW and key_ptr.dtype.element_ty != tl.float32:
        # Few enough heads for all their queries to stay in shared memory.
        mask = is_query
        first_query = tl.load(query_ptr + query_cells, mask=mask, other=0.0)
        first_lse = tl.load(lse_ptr + line, mask=is_row, other=0.0)
        if GROUP > 1:
            second_query = tl.load(query_ptr + query_stride_h + query_cells, mask=mask, other=0.0)
            second_lse = tl.load(lse_ptr + rows + line, mask=is_row, other=0.0)
        if GROUP > 2:
            third_query = tl.load(query_ptr + 2 * query_stride_h + query_cells, mask=mask, other=0.0)
            third_lse = tl.load(lse_ptr + 2 * rows + line, mask=is_row, other=0.0)
            fourth_query = tl.load(query_ptr + 3 * query_stride_h + query_cells, mask=mask, other=0.0)
            fourth_lse = tl.load(lse_ptr + 3 * rows + line, mask=is_row, other=0.0)
        for i in tl.range(0, steps):
            at = low + i * BLOCK_N
            index = at + column
            key = tl.load(
                key_ptr + at.to(tl.int64) * key_stride_n + key_cells,
                mask=(index <= last)[None, :] & (dim < D)[:, None],
                other=0.0,
            )
            best = tl.dot(first_query, key, input_precision=PRECISION) * scale - first_lse[:, None]
            if GROUP > 1:
                weight = tl.dot(second_query, key, input_precision=PRECISION) * scale - second_lse[:, None]
                best = tl.maximum(best, weight)
            if GROUP > 2:
                weight = tl.dot(third_query, key, input_precision=PRECISION) * scale - third_lse[:, None]
                best = tl.maximum(best, weight)
                weight = tl.dot(fourth_query, key, input_precision=PRECISION) * scale - fourth_lse[:, None]
                best = tl.maximum(best, weight)
            is_seen = is_row[:, None] & (index[None, :] <= position[:, None])
            tl.store(weights_ptr + (at - start) + cells, tl.maximum(best, LEAST).to(tl.float16), mask=is_seen)
    else:
        for i in tl.range(0, steps):
            at = low + i * BLOCK_N
            index = at + column
            key = tl.load(
                key_ptr + at.to(tl.int64) * key_stride_n + key_cells,
                mask=(index <= last)[None, :] & (dim < D)[:, None],
                other=0.0,
            )
            to = weights_ptr + (at - start)
            is_seen = is_row[:, None] & (index[None, :] <= position[:, None])
            best = tl.full([BLOCK_M, BLOCK_N], LEAST, tl.float32)
            for member in tl.range(0, GROUP):
                wide = tl.cast(member, tl.int64)
                query = tl.load(query_ptr + wide * query_stride_h + query_cells, mask=is_query, other=0.0)
                lse = tl.load(lse_ptr + wide * rows + line, mask=is_row, other=0.0)
                weight = tl.dot(query, key, input_precision=PRECISION) * scale - lse[:, None]
                if BEST:
                    best = tl.maximum(best, weight)
                else:
                    weight = tl.maximum(weight, LEAST)
                    tl.store(to + wide * part_rows * keys + cells, weight.to(tl.float16), mask=is_seen)
            if BEST:
                tl.store(to + cells, best.to(tl.float16), mask=is_seen)


@triton.jit
def pool_positions_kernel(
    weights_ptr, lengths_ptr, pooled_ptr, rows, keys, pieces, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest of the ``WIDTH`` numbers around each of ``BLOCK``, as far as the row goes, fp16 ``[heads, rows,
    keys]``. Grid: pieces fastest."""
    piece = tl.program_id(0) % pieces
    line = tl.program_id(0) // pieces
    length = tl.load(lengths_ptr + line % rows)
    if piece * BLOCK >= length:
        return
    weights_ptr += line.to(tl.int64) * keys
    pooled_ptr += line.to(tl.int64) * keys
    column = piece * BLOCK + tl.arange(0, BLOCK)
    HALF: tl.constexpr = WIDTH // 2
    if (piece > 0) & (piece * BLOCK + BLOCK + HALF <= length):
        best = tl.load(weights_ptr + column)
        for step in tl.static_range(1, HALF + 1):
            best = tl.maximum(best, tl.load(weights_ptr + column - step))
            best = tl.maximum(best, tl.load(weights_ptr + column + step))
        tl.store(pooled_ptr + column, best)
    else:
        best = tl.load(weights_ptr + column, mask=column < length, other=float("-inf"))
        for step in tl.static_range(1, HALF + 1):
            is_before = (column >= step) & (column < length)
            best = tl.maximum(best, tl.load(weights_ptr + column - step, mask=is_before, other=float("-inf")))
            is_behind = column < length - step
            best = tl.maximum(best, tl.load(weights_ptr + column + step, mask=is_behind, other=float("-inf")))
        tl.store(pooled_ptr + column, best, mask=column < length)
