"""The backward kernel over rows: dQ, and of selected keys the gradient of thresholds, of others each tile's part of dK
and dV.

It recomputes the weights from the saved log-sum-exp, once. Where every line sees the whole list, what a tile adds to
its keys goes to places of their own, to be added in order: five products a block of keys. These parts are formed
transposed, channels by keys: Triton before 3.7.1 miscompiles a product with the transpose of an accumulator on Hopper.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.gathered_rows import gather
from sparsetrain_kernels.key_lists.triton.gates import gate, gates_of_block, grad_pairs
from sparsetrain_kernels.key_lists.triton.tiles import lines_of_tile, masked_keys, place_of_program, read_tile, sees
from sparsetrain_kernels.online_softmax import LOG2E


@triton.jit(do_not_specialize=["first_tile", "part_tiles", "first_head", "part_heads"])
def key_lists_bwd_rows_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    partial_ptr,
    tiles_ptr,
    keys_ptr,
    counts_ptr,
    whole_ptr,
    scores_ptr,
    threshold_ptr,
    exit_ptr,
    doc_start_ptr,
    grad_threshold_ptr,
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
    padded_tokens,
    window,
    first_tile,
    part_tiles,
    first_head,
    part_heads,
    lists,
    capacity,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECTED: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The lines of a tile over the keys of the forward kernel, for ``part_tiles`` tiles from ``first_tile`` on and
    ``part_heads`` KV heads from ``first_head`` on; grid likewise.

    The log-sum-exp (in units of log2), delta and threshold of rows have ``padded_tokens`` places a head. With
    ``SELECTED``, leaves each line's threshold gradient, fp32 ``[B, heads, tokens]``. Else sums over the tile's lines in
    ``partial_ptr``, ``[B, part_heads, part_tiles, capacity, 2, D_PAD]``: for keys, not yet scaled, and for values.
    """
    part_tile, part_head, member, batch = place_of_program(part_tiles, part_heads, GROUP, MEMBERS, SELECTED)
    kv_head = (first_head + part_head).to(tl.int64)
    listing, first, end, low, low_whole, high_whole = read_tile(
        first_tile + part_tile, tiles_ptr, doc_start_ptr, tokens, window, ROWS, LIST_ROWS, BLOCK_N, SELECTED, PACKED
    )
    if not SELECTED:  # noqa: SIM102 (known when compiled)
        if first >= end:
            return
    row, head, is_line = lines_of_tile(first, end, kv_head * GROUP + member, MEMBERS, ROWS, BLOCK_M)
    wide_row = row.to(tl.int64)
    dim = tl.arange(0, D_PAD)
    is_query = is_line[:, None] & (dim < D)[None, :]
    query_cells = query_ptr + batch * query_stride_b + (head * query_stride_h + wide_row * query_stride_n)[:, None]
    query = tl.load(query_cells + dim[None, :], mask=is_query, other=0.0)
    grad_cells = grad_out_ptr + batch * grad_stride_b + (head * grad_stride_h + wide_row * grad_stride_n)[:, None]
    grad_out = tl.load(grad_cells + dim[None, :], mask=is_query, other=0.0)
    pair = batch * KV_HEADS * GROUP + head
    lse = tl.load(lse_ptr + pair * padded_tokens + row, mask=is_line, other=float("inf"))
    delta = tl.load(delta_ptr + pair * padded_tokens + row, mask=is_line, other=0.0)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    selection = batch * SELECTIONS + (kv_head if SELECTIONS > 1 else 0)
    place = selection * lists + listing
    keys_ptr += place * capacity
    listed = tl.load(counts_ptr + place)
    doc_start = tl.zeros_like(row)
    if SELECTED:
        scores_ptr += selection * tokens
        exit_ptr += selection * tokens
        threshold = tl.load(threshold_ptr + selection * padded_tokens + row, mask=is_line, other=0.0)
        if PACKED:
            doc_start = tl.load(doc_start_ptr + row, mask=is_line, other=0)

    to_log2 = scale * LOG2E
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    if SELECTED:
        grad_threshold = tl.zeros([BLOCK_M], tl.float32)
        rest = tl.load(whole_ptr + place) // BLOCK_N * BLOCK_N
        for i in tl.range(0, rest // BLOCK_N):
            index = tl.load(keys_ptr + i * BLOCK_N + column)
            key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
            weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
            gates = gate(tl.load(scores_ptr + index)[None, :], threshold[:, None])
            grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
            grad_logits, grad_gates = grad_pairs(weights, gates, grad_weights, delta[:, None], GATE)
            grad_threshold -= tl.sum(grad_gates, 1)
            acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
        for i in tl.range(0, (high_whole - low_whole) // BLOCK_N):
            index = low_whole + i * BLOCK_N + column
            key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
            weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
            grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
            grad_logits = weights * (grad_weights - delta[:, None])
            acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
    else:
        rest = listed
        partial_ptr += ((batch * part_heads + part_head) * part_tiles + part_tile) * capacity * (2 * D_PAD)
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
    n_list = tl.cdiv(listed - rest, BLOCK_N)
    n_edge = tl.cdiv(low_whole - low, BLOCK_N)
    n_diagonal = tl.cdiv(end - high_whole, BLOCK_N)
    for i in tl.range(0, n_list + n_edge + n_diagonal):
        index, is_key, is_listed = masked_keys(
            keys_ptr, i, n_list, n_edge, rest, listed, low, low_whole, high_whole, end, first, column, BLOCK_N, SELECTED
        )
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
        visible = sees(row, doc_start, index, is_key, is_listed, exit_ptr, window, SELECTED)
        weights = tl.where(visible, weights, 0.0)
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        if SELECTED:
            gates = gates_of_block(scores_ptr, index, is_listed, threshold)
            grad_logits, grad_gates = grad_pairs(weights, gates, grad_weights, delta[:, None], GATE)
            grad_threshold -= tl.sum(grad_gates, 1)
        else:
            grad_logits = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)

    grad_query_ptr += batch * grad_query_stride_b
    cells = grad_query_ptr + (head * grad_query_stride_h + wide_row * grad_query_stride_n)[:, None] + dim[None, :]
    tl.store(cells, (acc * scale).to(grad_query_ptr.dtype.element_ty), mask=is_query)
    if SELECTED:
        tl.store(grad_threshold_ptr + pair * tokens + row, grad_threshold, mask=is_line)
