"""The forward kernel: one program per tile of rows and head, an online softmax over the tile's list and its window."""

import triton
import triton.language as tl

from sparsetrain_kernels.gathered_rows import gather
from sparsetrain_kernels.online_softmax import LOG2E, accumulate_gated


@triton.jit
def selected_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    scores_ptr,
    threshold_ptr,
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
    out_stride_b,
    out_stride_h,
    out_stride_n,
    tokens,
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
    """``BLOCK_M`` rows of one head. Grid: heads fastest, so that the heads of a group share the keys they gather in L2,
    then tiles, then the batch.

    Keys that every row of the tile sees come first, without a mask: those of the list, then those of the window. The
    running maximum is kept in units of the raw products.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % tiles
    batch = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < tokens
    dim = tl.arange(0, D_PAD)
    is_query = is_row[:, None] & (dim < D)[None, :]
    query_ptr += batch * query_stride_b + head.to(tl.int64) * query_stride_h
    wide_row = row.to(tl.int64)
    query = tl.load(query_ptr + wide_row[:, None] * query_stride_n + dim[None, :], mask=is_query, other=0.0)

    kv_head = (head // GROUP).to(tl.int64)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    selection = batch * SELECTIONS + (kv_head if SELECTIONS > 1 else 0)
    scores_ptr += selection * tokens
    exit_ptr += selection * tokens
    if GATE != "straight":
        threshold = tl.load(threshold_ptr + selection * tokens + row, mask=is_row, other=0.0)
    else:
        threshold = tl.zeros([BLOCK_M], tl.float32)
    # A tile may be a part of a list's rows.
    entry = selection * ((tiles * BLOCK_M + LIST_ROWS - 1) // LIST_ROWS) + first // LIST_ROWS
    list_ptr += entry * capacity
    whole = tl.load(counts_ptr + entry * 2)
    listed = tl.load(counts_ptr + entry * 2 + 1)
    low, low_whole, high_whole, high, doc_start = window_of_rows(
        doc_start_ptr, first, row, tokens, window, BLOCK_M, BLOCK_N, PACKED
    )

    to_log2 = scale * LOG2E
    column = tl.arange(0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in tl.range(0, whole // BLOCK_N):
        index = tl.load(list_ptr + i * BLOCK_N + column)
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        gates = 1.0
        if GATE != "straight":
            gates = gate(tl.load(scores_ptr + index)[None, :], threshold[:, None])
        peak, total, acc = accumulate_gated(logits, gates, value, peak, total, acc, to_log2, GATE, PRECISION)
    for i in tl.range(0, (high_whole - low_whole) // BLOCK_N):
        index = low_whole + i * BLOCK_N + column
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        peak, total, acc = accumulate_gated(logits, 1.0, value, peak, total, acc, to_log2, "straight", PRECISION)
    # What not every row sees: the rest of the list, the far edge of the window, and the diagonal.
    rest = whole // BLOCK_N * BLOCK_N
    n_list = tl.cdiv(listed - rest, BLOCK_N)
    n_edge = tl.cdiv(low_whole - low, BLOCK_N)
    n_diagonal = tl.cdiv(high - high_whole, BLOCK_N)
    for i in tl.range(0, n_list + n_edge + n_diagonal):
        index, is_key, is_selected = masked_keys(
            list_ptr, i, n_list, n_edge, rest, listed, low, low_whole, high_whole, high, column, BLOCK_N
        )
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        exit = tl.load(exit_ptr + index)
        visible = sees(row, doc_start, index, exit, is_key, is_selected, window)
        gates = 1.0
        if GATE != "straight":
            score = tl.load(scores_ptr + index)
            score = tl.where(is_selected, score, float("inf"))
            gates = gate(score[None, :], threshold[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        peak, total, acc = accumulate_gated(logits, gates, value, peak, total, acc, to_log2, GATE, PRECISION)

    out_ptr += batch * out_stride_b + head.to(tl.int64) * out_stride_h
    # Rows past the end saw nothing.
    total = tl.where(is_row, total, 1.0)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide_row[:, None] * out_stride_n + dim[None, :], out, mask=is_query)
    lse_ptr += (batch * HEADS + head) * tokens
    tl.store(lse_ptr + row, (peak * to_log2 + tl.log2(total)) / LOG2E, mask=is_row)


@triton.jit
def window_of_rows(
    doc_start_ptr,
    first,
    row,
    tokens,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The window's keys of rows ``first`` to ``first + BLOCK_M - 1``, from ``low`` to ``high - 1``. Those from
    ``low_whole`` to ``high_whole - 1`` are seen by all the rows and a multiple of ``BLOCK_N``. Also the first row of
    each row's document."""
    last = tl.minimum(first + BLOCK_M, tokens) - 1
    low = tl.maximum(first - window + 1, 0)
    doc_start = tl.zeros_like(row)
    last_start = 0
    if PACKED:
        doc_start = tl.load(doc_start_ptr + row, mask=row < tokens, other=0)
        low = tl.maximum(low, tl.load(doc_start_ptr + first))
        last_start = tl.load(doc_start_ptr + last)
    low_whole = tl.maximum(tl.maximum(last - window + 1, last_start), low)
    low_whole = tl.minimum(low_whole, first + 1)
    count = tl.maximum(first + 1 - low_whole, 0) // BLOCK_N * BLOCK_N
    # The remainder joins the edge, which is masked anyhow, as long as there is one.
    low_whole = first + 1 - count
    return low, low_whole, first + 1, last + 1, doc_start


@triton.jit
def masked_keys(
    list_ptr,
    i,
    n_list,
    n_edge,
    rest,
    listed,
    low,
    low_whole,
    high_whole,
    high,
    column,
    BLOCK_N: tl.constexpr,
):
    """Tile ``i`` of the keys that some rows do not see: the keys, which of them exist, and whether they are selected
    ones. The rest of the list first, then the window's two edges."""
    is_selected = i < n_list
    in_edge = i < n_list + n_edge
    start = tl.where(in_edge, low + (i - n_list) * BLOCK_N, high_whole + (i - n_list - n_edge) * BLOCK_N)
    start = tl.where(is_selected, rest + i * BLOCK_N, start)
    end = tl.where(is_selected, listed, tl.where(in_edge, low_whole, high))
    place = start + column
    is_key = place < end
    from_list = tl.load(list_ptr + place, mask=place < tl.where(is_selected, listed, 0), other=0)
    index = tl.where(is_selected, from_list, place)
    return tl.where(is_key, index, 0), is_key, is_selected


@triton.jit
def sees(row, doc_start, index, exit, is_key, is_selected, window):
    """Which of the rows see which of the keys: a selected key from the moment it leaves the window to its exit, a key
    of the window until then, within its document."""
    enter = index + tl.where(is_selected, window, 0)
    leave = tl.where(is_selected, exit, index + window)
    leave = tl.where(is_key, leave, -1)
    start = tl.where(is_selected, 0, doc_start)
    inside = (row[:, None] >= enter[None, :]) & (row[:, None] < leave[None, :])
    return inside & (index[None, :] >= start[:, None])


@triton.jit
def gate(score, threshold):
    """``clip(score - threshold, 0, 1)``. A sink's score is inf, a threshold with room for all is -inf: both give 1."""
    return tl.minimum(tl.maximum(score - threshold, 0.0), 1.0)
