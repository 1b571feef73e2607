"""The forward kernel: one program per tile of lines, an online softmax over its list and its neighbouring keys."""

import triton
import triton.language as tl

from sparsetrain_kernels.gathered_rows import gather
from sparsetrain_kernels.key_lists.triton.gates import gate, gates_of_block
from sparsetrain_kernels.key_lists.triton.tiles import lines_of_tile, masked_keys, place_of_program, read_tile, sees
from sparsetrain_kernels.online_softmax import LOG2E, accumulate_gated


@triton.jit
def key_lists_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    keys_ptr,
    counts_ptr,
    whole_ptr,
    scores_ptr,
    threshold_ptr,
    exit_ptr,
    doc_start_ptr,
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
    """Up to ``ROWS`` rows of ``MEMBERS`` heads. With ``SELECTED``, a listed key has a range of rows and a gate
    (``GATE``), and a neighbour is seen for ``window`` rows.

    Keys that every line sees come first, without a mask: those of the list, then neighbours. The running maximum is
    kept in units of the raw products.
    """
    tile, kv_head, member, batch = place_of_program(tiles, KV_HEADS, GROUP, MEMBERS, SELECTED)
    kv_head = kv_head.to(tl.int64)
    listing, first, end, low, low_whole, high_whole = read_tile(
        tile, tiles_ptr, doc_start_ptr, tokens, window, ROWS, LIST_ROWS, BLOCK_N, SELECTED, PACKED
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
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    selection = batch * SELECTIONS + (kv_head if SELECTIONS > 1 else 0)
    place = selection * lists + listing
    keys_ptr += place * capacity
    listed = tl.load(counts_ptr + place)
    whole = listed
    doc_start = tl.zeros_like(row)
    threshold = tl.zeros([BLOCK_M], tl.float32)
    if SELECTED:
        whole = tl.load(whole_ptr + place)
        exit_ptr += selection * tokens
        if PACKED:
            doc_start = tl.load(doc_start_ptr + row, mask=is_line, other=0)
        if GATE != "straight":
            scores_ptr += selection * tokens
            threshold = tl.load(threshold_ptr + selection * tokens + row, mask=is_line, other=0.0)

    to_log2 = scale * LOG2E
    column = tl.arange(0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in tl.range(0, whole // BLOCK_N):
        index = tl.load(keys_ptr + i * BLOCK_N + column)
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        gates = 1.0
        if GATE != "straight":
            gates = gate(tl.load(scores_ptr + index)[None, :], threshold[:, None])
        peak, total, acc = accumulate_gated(logits, gates, value, peak, total, acc, to_log2, GATE, PRECISION)
    if SELECTED:
        for i in tl.range(0, (high_whole - low_whole) // BLOCK_N):
            index = low_whole + i * BLOCK_N + column
            key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            peak, total, acc = accumulate_gated(logits, 1.0, value, peak, total, acc, to_log2, "straight", PRECISION)
    # What not every line sees: the rest of the list, and the neighbours before and behind.
    rest = whole // BLOCK_N * BLOCK_N
    n_list = tl.cdiv(listed - rest, BLOCK_N)
    n_edge = tl.cdiv(low_whole - low, BLOCK_N)
    n_diagonal = tl.cdiv(end - high_whole, BLOCK_N)
    for i in tl.range(0, n_list + n_edge + n_diagonal):
        index, is_key, is_listed = masked_keys(
            keys_ptr, i, n_list, n_edge, rest, listed, low, low_whole, high_whole, end, first, column, BLOCK_N, SELECTED
        )
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        visible = sees(row, doc_start, index, is_key, is_listed, exit_ptr, window, SELECTED)
        gates = 1.0
        if GATE != "straight":
            gates = gates_of_block(scores_ptr, index, is_listed, threshold)
        logits = tl.where(visible, logits, float("-inf"))
        peak, total, acc = accumulate_gated(logits, gates, value, peak, total, acc, to_log2, GATE, PRECISION)

    if SELECTED:
        # Lines that do not exist may have seen nothing.
        total = tl.where(is_line, total, 1.0)
    out_cells = out_ptr + batch * out_stride_b + (head * out_stride_h + wide_row * out_stride_n)[:, None]
    tl.store(out_cells + dim[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
    lse = (peak * to_log2 + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (batch * KV_HEADS * GROUP + head) * tokens + row, lse, mask=is_line)
