"""The kernels over chosen rows: forward, and dQ. One program per tile of rows and head, over all keys up to the rows'.

The backward one recomputes the weights from the saved log-sum-exp. ``delta`` is the sum of each row's ``grad_out *
out``.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.online_softmax import LOG2E, accumulate, accumulate_gated


@triton.jit
def causal_rows_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    positions_ptr,
    doc_start_ptr,
    tiles_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    rows,
    tiles,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_M`` rows of one head. Grid: heads fastest, so that the heads of a group share keys in L2, then tiles, the
    last rows, which see the most keys, first, then the batch."""
    head = tl.program_id(0) % HEADS
    tile = tiles - 1 - tl.program_id(0) // HEADS % tiles
    batch = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    first, end = bounds_of_tile(tiles_ptr, tile, rows, BLOCK_M, PACKED)
    if first >= end:
        return
    row, is_row, position, start, whole, last = keys_of_rows(
        positions_ptr, doc_start_ptr, first, end, BLOCK_M, BLOCK_N, PACKED
    )
    dim = tl.arange(0, D_PAD)
    is_query = is_row[:, None] & (dim < D)[None, :]
    query_ptr += batch * query_stride_b + head.to(tl.int64) * query_stride_h
    query = tl.load(query_ptr + row[:, None] * query_stride_n + dim[None, :], mask=is_query, other=0.0)
    kv_head = (head // GROUP).to(tl.int64)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    column = tl.arange(0, BLOCK_N)
    # 32-bit offsets within a tile, a 64-bit start for each.
    key_cells = column[None, :] * key_stride_n + dim[:, None]
    value_cells = column[:, None] * value_stride_n + dim[None, :]

    to_log2 = scale * LOG2E
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in tl.range(0, whole):
        wide = (start + i * BLOCK_N).to(tl.int64)
        if D == D_PAD:
            key = tl.load(key_ptr + wide * key_stride_n + key_cells)
            value = tl.load(value_ptr + wide * value_stride_n + value_cells)
        else:
            key = tl.load(key_ptr + wide * key_stride_n + key_cells, mask=(dim < D)[:, None], other=0.0)
            value = tl.load(value_ptr + wide * value_stride_n + value_cells, mask=(dim < D)[None, :], other=0.0)
        logits = tl.dot(query, key, input_precision=PRECISION)
        # The first key is seen by all.
        peak, total, acc = accumulate(logits, value, peak, total, acc, to_log2, PRECISION)
    for i in tl.range(whole, tl.cdiv(last + 1 - start, BLOCK_N)):
        wide = (start + i * BLOCK_N).to(tl.int64)
        index = start + i * BLOCK_N + column
        is_key = index <= last
        key = tl.load(key_ptr + wide * key_stride_n + key_cells, mask=is_key[None, :] & (dim < D)[:, None], other=0.0)
        value = tl.load(
            value_ptr + wide * value_stride_n + value_cells, mask=is_key[:, None] & (dim < D)[None, :], other=0.0
        )
        logits = tl.dot(query, key, input_precision=PRECISION)
        logits = tl.where(index[None, :] <= position[:, None], logits, float("-inf"))
        peak, total, acc = accumulate_gated(logits, 1.0, value, peak, total, acc, to_log2, "straight", PRECISION)

    out_ptr += batch * out_stride_b + head.to(tl.int64) * out_stride_h
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * out_stride_n + dim[None, :], out, mask=is_query)
    lse = (peak * to_log2 + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (batch * HEADS + head) * rows + row, lse, mask=is_row)


@triton.jit
def causal_rows_bwd_dq_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    positions_ptr,
    doc_start_ptr,
    tiles_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_n,
    rows,
    tiles,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_M`` rows of one head, over the same keys and on the same grid as the forward kernel."""
    head = tl.program_id(0) % HEADS
    tile = tiles - 1 - tl.program_id(0) // HEADS % tiles
    batch = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    first, end = bounds_of_tile(tiles_ptr, tile, rows, BLOCK_M, PACKED)
    if first >= end:
        return
    row, is_row, position, start, whole, last = keys_of_rows(
        positions_ptr, doc_start_ptr, first, end, BLOCK_M, BLOCK_N, PACKED
    )
    dim = tl.arange(0, D_PAD)
    is_query = is_row[:, None] & (dim < D)[None, :]
    query_ptr += batch * query_stride_b + head.to(tl.int64) * query_stride_h
    query = tl.load(query_ptr + row[:, None] * query_stride_n + dim[None, :], mask=is_query, other=0.0)
    grad_out_ptr += batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    grad_out = tl.load(grad_out_ptr + row[:, None] * grad_stride_n + dim[None, :], mask=is_query, other=0.0)
    place = (batch * HEADS + head) * rows + row
    lse = tl.load(lse_ptr + place, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + place, mask=is_row, other=0.0)
    kv_head = (head // GROUP).to(tl.int64)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    column = tl.arange(0, BLOCK_N)
    key_cells = column[:, None] * key_stride_n + dim[None, :]
    value_cells = column[None, :] * value_stride_n + dim[:, None]

    to_log2 = scale * LOG2E
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in tl.range(0, whole):
        wide = (start + i * BLOCK_N).to(tl.int64)
        if D == D_PAD:
            key = tl.load(key_ptr + wide * key_stride_n + key_cells)
            value = tl.load(value_ptr + wide * value_stride_n + value_cells)
        else:
            key = tl.load(key_ptr + wide * key_stride_n + key_cells, mask=(dim < D)[None, :], other=0.0)
            value = tl.load(value_ptr + wide * value_stride_n + value_cells, mask=(dim < D)[:, None], other=0.0)
        weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
        grad_weights = tl.dot(grad_out, value, input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
    for i in tl.range(whole, tl.cdiv(last + 1 - start, BLOCK_N)):
        wide = (start + i * BLOCK_N).to(tl.int64)
        index = start + i * BLOCK_N + column
        is_key = index <= last
        key = tl.load(key_ptr + wide * key_stride_n + key_cells, mask=is_key[:, None] & (dim < D)[None, :], other=0.0)
        value = tl.load(
            value_ptr + wide * value_stride_n + value_cells, mask=is_key[None, :] & (dim < D)[:, None], other=0.0
        )
        weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
        weights = tl.where(index[None, :] <= position[:, None], weights, 0.0)
        grad_weights = tl.dot(grad_out, value, input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)

    grad_query_ptr += batch * grad_query_stride_b + head.to(tl.int64) * grad_query_stride_h
    grad_query = (acc * scale).to(grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + row[:, None] * grad_query_stride_n + dim[None, :], grad_query, mask=is_query)


@triton.jit
def bounds_of_tile(tiles_ptr, tile, rows, BLOCK_M: tl.constexpr, PACKED: tl.constexpr):
    """The first row of a tile and the one past its last; with packed documents, of one of them."""
    if PACKED:
        return tl.load(tiles_ptr + tile * 2), tl.load(tiles_ptr + tile * 2 + 1)
    return tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, rows)


@triton.jit
def keys_of_rows(
    positions_ptr, doc_start_ptr, first, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr
):
    """The rows, int64, which of them exist, and their places among the keys; the first key of their document, how many
    whole tiles of keys from there on all of them see, and the last key that one of them does."""
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    last = tl.load(positions_ptr + end - 1)
    # Rows that do not exist see what the last one sees, and are not stored.
    position = tl.load(positions_ptr + row, mask=is_row, other=0)
    position = tl.where(is_row, position, last)
    seen_by_all = tl.load(positions_ptr + first)
    start = 0
    if PACKED:
        start = tl.load(doc_start_ptr + seen_by_all)
    return row.to(tl.int64), is_row, position, start, (seen_by_all + 1 - start) // BLOCK_N, last
