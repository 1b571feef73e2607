"""The backward kernel over rows: dQ and the gradient of thresholds, over the rows' own lists and windows.

It recomputes the weights from the saved log-sum-exp. ``delta`` is the sum of each row's ``grad_out * out``. Tensors
whose names begin with ``padded`` have whole tiles of rows (``row_stats.py``).
"""

import triton
import triton.language as tl

from sparsetrain_kernels.gathered_rows import gather
from sparsetrain_kernels.online_softmax import LOG2E
from sparsetrain_kernels.selected_keys.triton.forward import (
    gate,
    masked_keys,
    sees,
    window_of_rows,
)


@triton.jit
def selected_bwd_dq_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    padded_threshold_ptr,
    grad_query_ptr,
    grad_threshold_ptr,
    scores_ptr,
    exit_ptr,
    doc_start_ptr,
    list_ptr,
    counts_ptr,
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
    tiles,
    capacity,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_M`` rows of one head, over the same keys and on the same grid as the forward kernel. Also each row's
    threshold gradient, fp32 ``[B, HEADS, tokens]``."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % tiles
    batch = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < tokens
    dim = tl.arange(0, D_PAD)
    is_query = is_row[:, None] & (dim < D)[None, :]
    wide_row = row.to(tl.int64)
    query_ptr += batch * query_stride_b + head.to(tl.int64) * query_stride_h
    query = tl.load(query_ptr + wide_row[:, None] * query_stride_n + dim[None, :], mask=is_query, other=0.0)
    grad_out_ptr += batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    grad_out = tl.load(grad_out_ptr + wide_row[:, None] * grad_stride_n + dim[None, :], mask=is_query, other=0.0)
    pair = batch * HEADS + head
    lse = tl.load(padded_lse_ptr + pair * padded_tokens + row)
    delta = tl.load(padded_delta_ptr + pair * padded_tokens + row)

    kv_head = (head // GROUP).to(tl.int64)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    selection = batch * SELECTIONS + (kv_head if SELECTIONS > 1 else 0)
    scores_ptr += selection * tokens
    exit_ptr += selection * tokens
    threshold = tl.load(padded_threshold_ptr + selection * padded_tokens + row)
    entry = selection * ((tiles * BLOCK_M + LIST_ROWS - 1) // LIST_ROWS) + first // LIST_ROWS
    list_ptr += entry * capacity
    whole = tl.load(counts_ptr + entry * 2)
    listed = tl.load(counts_ptr + entry * 2 + 1)
    low, low_whole, high_whole, high, doc_start = window_of_rows(
        doc_start_ptr, first, row, tokens, window, BLOCK_M, BLOCK_N, PACKED
    )

    to_log2 = scale * LOG2E
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    grad_threshold = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(0, whole // BLOCK_N):
        index = tl.load(list_ptr + i * BLOCK_N + column)
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
    rest = whole // BLOCK_N * BLOCK_N
    n_list = tl.cdiv(listed - rest, BLOCK_N)
    n_edge = tl.cdiv(low_whole - low, BLOCK_N)
    n_diagonal = tl.cdiv(high - high_whole, BLOCK_N)
    for i in tl.range(0, n_list + n_edge + n_diagonal):
        index, is_key, is_selected = masked_keys(
            list_ptr, i, n_list, n_edge, rest, listed, low, low_whole, high_whole, high, column, BLOCK_N
        )
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * to_log2 - lse[:, None])
        exit = tl.load(exit_ptr + index)
        visible = sees(row, doc_start, index, exit, is_key, is_selected, window)
        weights = tl.where(visible, weights, 0.0)
        score = tl.load(scores_ptr + index)
        score = tl.where(is_selected, score, float("inf"))
        gates = gate(score[None, :], threshold[:, None])
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        grad_logits, grad_gates = grad_pairs(weights, gates, grad_weights, delta[:, None], GATE)
        grad_threshold -= tl.sum(grad_gates, 1)
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)

    grad_query_ptr += batch * grad_query_stride_b + head.to(tl.int64) * grad_query_stride_h
    grad_query = (acc * scale).to(grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + wide_row[:, None] * grad_query_stride_n + dim[None, :], grad_query, mask=is_query)
    tl.store(grad_threshold_ptr + pair * tokens + row, grad_threshold, mask=is_row)


@triton.jit
def grad_pairs(weights, gates, grad_weights, delta, GATE: tl.constexpr):
    """The gradients of logits and gates; of the gates, where they lie strictly between 0 and 1. ``weights`` are without
    the gates."""
    interior = (gates > 0.0) & (gates < 1.0)
    if GATE == "value":
        per_gate = weights * grad_weights
        grad_logits = gates * per_gate - weights * delta
    else:
        per_gate = weights * (grad_weights - delta)
        grad_logits = per_gate
        if GATE == "log":
            grad_logits = per_gate * gates
    return grad_logits, tl.where(interior, per_gate, 0.0)
