"""The backward kernel over keys: dK and dV of neighbouring keys, over the chosen rows that see them."""

import triton
import triton.language as tl

from sparsetrain_kernels.online_softmax import LOG2E


@triton.jit
def causal_rows_bwd_dkv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    positions_ptr,
    key_tiles_ptr,
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
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    rows,
    key_tiles,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` keys of one KV head, over all heads of its group. Grid: KV heads fastest, then key tiles, the first
    keys, which most rows see, first, then the batch. Logits are formed transposed, keys by rows.

    Of each key tile ``key_tiles_ptr``, int32 ``[key_tiles, 5]``, has the first key and the one past its last, and the
    first row that sees the former, the first one that sees all, and the row past the document's last.
    """
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    key_tile = tl.program_id(0) // KV_HEADS % key_tiles
    batch = (tl.program_id(0) // KV_HEADS // key_tiles).to(tl.int64)
    key_tiles_ptr += key_tile * 5
    start = tl.load(key_tiles_ptr)
    end = tl.load(key_tiles_ptr + 1)
    first = tl.load(key_tiles_ptr + 2)
    first_whole = tl.load(key_tiles_ptr + 3)
    last = tl.load(key_tiles_ptr + 4)
    if start >= end:
        return
    index = start + tl.arange(0, BLOCK_N)
    is_key = index < end
    dim = tl.arange(0, D_PAD)
    is_key_dim = is_key[:, None] & (dim < D)[None, :]
    wide_index = index.to(tl.int64)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    key = tl.load(key_ptr + wide_index[:, None] * key_stride_n + dim[None, :], mask=is_key_dim, other=0.0)
    value = tl.load(value_ptr + wide_index[:, None] * value_stride_n + dim[None, :], mask=is_key_dim, other=0.0)

    line = tl.arange(0, BLOCK_M)
    query_ptr += batch * query_stride_b + kv_head * GROUP * query_stride_h
    grad_out_ptr += batch * grad_stride_b + kv_head * GROUP * grad_stride_h
    place = (batch * KV_HEADS + kv_head) * GROUP * rows
    lse_ptr += place
    delta_ptr += place
    to_log2 = scale * LOG2E
    grad_key = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    grad_value = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    masked = tl.cdiv(first_whole - first, BLOCK_M)
    for i in tl.range(0, GROUP * masked):
        row = first + i % masked * BLOCK_M + line
        query, grad_out, lse, delta = _rows_of_member(
            query_ptr,
            grad_out_ptr,
            lse_ptr,
            delta_ptr,
            i // masked,
            row,
            last,
            rows,
            query_stride_h,
            query_stride_n,
            grad_stride_h,
            grad_stride_n,
            dim,
            D,
        )
        position = tl.load(positions_ptr + row, mask=row < last, other=-1)
        visible = position[None, :] >= index[:, None]
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * to_log2 - lse[None, :])
        weights = tl.where(visible, weights, 0.0)
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        # A key that no row sees may be NaN.
        grad_logits = tl.where(visible, weights * (grad_weights - delta[None, :]), 0.0)
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    start_whole = first + masked * BLOCK_M
    whole = tl.cdiv(tl.maximum(last - start_whole, 0), BLOCK_M)
    for i in tl.range(0, GROUP * whole):
        query, grad_out, lse, delta = _rows_of_member(
            query_ptr,
            grad_out_ptr,
            lse_ptr,
            delta_ptr,
            i // whole,
            start_whole + i % whole * BLOCK_M + line,
            last,
            rows,
            query_stride_h,
            query_stride_n,
            grad_stride_h,
            grad_stride_n,
            dim,
            D,
        )
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * to_log2 - lse[None, :])
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)

    grad_key_ptr += batch * grad_key_stride_b + kv_head * grad_key_stride_h
    grad_value_ptr += batch * grad_value_stride_b + kv_head * grad_value_stride_h
    grad_key = (grad_key * scale).to(grad_key_ptr.dtype.element_ty)
    grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
    tl.store(grad_key_ptr + wide_index[:, None] * grad_key_stride_n + dim[None, :], grad_key, mask=is_key_dim)
    tl.store(grad_value_ptr + wide_index[:, None] * grad_value_stride_n + dim[None, :], grad_value, mask=is_key_dim)


@triton.jit
def _rows_of_member(
    query_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    member,
    row,
    last,
    rows,
    query_stride_h,
    query_stride_n,
    grad_stride_h,
    grad_stride_n,
    dim,
    D: tl.constexpr,
):
    """The rows ``row`` of query head ``member`` of the group: query, output gradient, log-sum-exp and delta. Those that
    do not exist have an infinite log-sum-exp, which makes their weights zero."""
    wide = tl.cast(member, tl.int64)
    wide_row = row.to(tl.int64)
    is_row = row < last
    mask = is_row[:, None] & (dim < D)[None, :]
    query_cells = query_ptr + wide * query_stride_h + wide_row[:, None] * query_stride_n + dim[None, :]
    grad_cells = grad_out_ptr + wide * grad_stride_h + wide_row[:, None] * grad_stride_n + dim[None, :]
    query = tl.load(query_cells, mask=mask, other=0.0)
    grad_out = tl.load(grad_cells, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + wide * rows + row, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + wide * rows + row, mask=is_row, other=0.0)
    return query, grad_out, lse, delta
