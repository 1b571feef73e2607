"""The backward kernel over rows: dQ, and each tile's part of dK and dV at its listed keys.

It recomputes the weights from the saved log-sum-exp, once: five products a tile of keys. What a tile adds to a key
goes to a place of its own, and ``grad_keys.py`` adds the places of a key in order. These parts are formed transposed,
channels by keys: Triton before 3.7.1 miscompiles a product with the transpose of an accumulator on Hopper.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.gathered_rows import gather
from sparsetrain_kernels.listed_keys.triton.forward import masked_keys, read_tile, rows_of_tile
from sparsetrain_kernels.online_softmax import LOG2E


@triton.jit(do_not_specialize=["first_tile", "part_tiles", "first_head", "part_heads"])
def listed_bwd_rows_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    partial_ptr,
    keys_ptr,
    counts_ptr,
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
    tokens,
    segments,
    first_tile,
    part_tiles,
    first_head,
    part_heads,
    capacity,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The rows of a tile as in the forward kernel, for ``part_tiles`` tiles from ``first_tile`` on and ``part_heads``
    KV heads from ``first_head`` on; grid likewise.

    Leaves sums over the tile's rows in ``partial_ptr``, ``[B, part_heads, part_tiles, capacity, 2, D_PAD]``: for keys,
    not yet scaled, and for values.
    """
    part_tile = tl.program_id(0) % part_tiles
    part_head = tl.program_id(0) // part_tiles % part_heads
    batch = (tl.program_id(0) // part_tiles // part_heads).to(tl.int64)
    kv_head = (first_head + part_head).to(tl.int64)
    segment, first, end, low = read_tile(tiles_ptr, first_tile + part_tile)
    if first >= end:
        return
    row, head, is_row = rows_of_tile(first, end, kv_head, GROUP, ROWS, BLOCK_M)
    dim = tl.arange(0, D_PAD)
    is_query = is_row[:, None] & (dim < D)[None, :]
    query_cells = query_ptr + batch * query_stride_b + (head * query_stride_h + row * query_stride_n)[:, None]
    query = tl.load(query_cells + dim[None, :], mask=is_query, other=0.0)
    grad_cells = grad_out_ptr + batch * grad_stride_b + (head * grad_stride_h + row * grad_stride_n)[:, None]
    grad_out = tl.load(grad_cells + dim[None, :], mask=is_query, other=0.0)
    statistic = (batch * KV_HEADS * GROUP + head) * tokens + row
    lse = tl.load(lse_ptr + statistic, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + statistic, mask=is_row, other=0.0)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    place = (batch * KV_HEADS + kv_head) * segments + segment
    keys_ptr += place * capacity
    listed = tl.load(counts_ptr + place)
    partial_ptr += ((batch * part_heads + part_head) * part_tiles + part_tile) * capacity * (2 * D_PAD)

    to_log2 = scale * LOG2E
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in tl.range(0, tl.cdiv(listed, BLOCK_N)):
        at = i * BLOCK_N + column
        is_key = at < listed
        # Places past the end are the first row's key, and are not stored.
        index = tl.load(keys_ptr + at, mask=is_key, other=0)
        index = tl.where(is_key, index, first)
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
        weights = tl.where(is_key[None, :], weights, 0.0)
        cells = partial_ptr + at[:, None] * (2 * D_PAD) + dim[None, :]
        grad_value = tl.dot(tl.trans(grad_out), weights.to(grad_out.dtype), input_precision=PRECISION)
        tl.store(cells + D_PAD, tl.trans(grad_value.to(partial_ptr.dtype.element_ty)), mask=is_key[:, None])
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        grad_logits = (weights * (grad_weights - delta[:, None])).to(query.dtype)
        grad_key = tl.dot(tl.trans(query), grad_logits, input_precision=PRECISION)
        tl.store(cells, tl.trans(grad_key.to(partial_ptr.dtype.element_ty)), mask=is_key[:, None])
        acc = tl.dot(grad_logits, key, acc, input_precision=PRECISION)
    for i in tl.range(0, tl.cdiv(end - low, BLOCK_N)):
        index, is_key = masked_keys(keys_ptr, i, 0, 0, 0, low, end, first, column, BLOCK_N)
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
        weights = tl.where(is_key[None, :] & (index[None, :] <= row[:, None]), weights, 0.0)
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        grad_logits = (weights * (grad_weights - delta[:, None])).to(query.dtype)
        acc = tl.dot(grad_logits, key, acc, input_precision=PRECISION)

    grad_query_ptr += batch * grad_query_stride_b
    cells = grad_query_ptr + (head * grad_query_stride_h + row * grad_query_stride_n)[:, None] + dim[None, :]
    tl.store(cells, (acc * scale).to(grad_query_ptr.dtype.element_ty), mask=is_query)
