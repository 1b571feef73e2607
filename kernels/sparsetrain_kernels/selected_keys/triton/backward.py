"""The backward kernels. No atomics: dQ over the rows' own lists; dK, dV and the gradient of scores over stretches of
rows first, each with its list of keys, and then one sum a key, with the part of its window.

All recompute the weights from the saved log-sum-exp. ``delta`` is the sum of each row's ``grad_out * out``. Tensors a
row of which the name begins with ``padded`` have whole tiles of rows; those that do not exist have an infinite
log-sum-exp, which makes their weights zero.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.selected_keys.triton.forward import (
    LOG2E,
    gate,
    gather,
    masked_keys,
    sees,
    window_of_rows,
)


@triton.jit
def selected_bwd_stats_kernel(
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    threshold_ptr,
    exit_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    padded_threshold_ptr,
    parts_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    tokens,
    padded_tokens,
    tiles,
    window,
    HEADS: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """The log-sum-exp in units of log2, ``delta``, and the threshold, fp32 ``[B, heads, padded_tokens]``; and in how
    many stretches of rows each key is selected, int32 ``[B, SELECTIONS, tokens]``."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % tiles
    batch = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < tokens
    dim = tl.arange(0, D_PAD)
    mask = is_row[:, None] & (dim < D)[None, :]
    out_ptr += batch * out_stride_b + head.to(tl.int64) * out_stride_h
    grad_out_ptr += batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    wide_row = row.to(tl.int64)
    out = tl.load(out_ptr + wide_row[:, None] * out_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_out_ptr + wide_row[:, None] * grad_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    pair = batch * HEADS + head
    lse = tl.load(lse_ptr + pair * tokens + row, mask=is_row, other=float("inf"))
    tl.store(padded_lse_ptr + pair * padded_tokens + row, lse * LOG2E)
    tl.store(padded_delta_ptr + pair * padded_tokens + row, tl.sum(out * grad, 1))
    if head < SELECTIONS:
        selection = batch * SELECTIONS + head
        threshold = tl.load(threshold_ptr + selection * tokens + row, mask=is_row, other=0.0)
        tl.store(padded_threshold_ptr + selection * padded_tokens + row, threshold)
        exit = tl.load(exit_ptr + selection * tokens + row, mask=is_row, other=0)
        parts = stretches_of(row + window, exit, STRETCH)
        tl.store(parts_ptr + selection * tokens + row, parts, mask=is_row)


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
def selected_bwd_stretch_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    padded_threshold_ptr,
    partial_ptr,
    partial_scores_ptr,
    scores_ptr,
    exit_ptr,
    list_ptr,
    counts_ptr,
    places_until_ptr,
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
    tokens,
    padded_tokens,
    window,
    stretches,
    capacity,
    first_head,
    part_heads,
    places,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRETCH: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` selected keys of one KV head, over the rows of a stretch that read them and all heads of the group.
    Grid: KV heads fastest (``part_heads`` of them, from ``first_head`` on), then the key tiles of a list, stretches and
    the batch. Logits are formed transposed, keys by rows.

    Leaves fp32 sums in ``partial_ptr``, ``[B, part_heads, places, 2, D_PAD]`` (keys, not yet scaled, then values), and
    of the scores in ``partial_scores_ptr``, ``[B, part_heads, places]``. The places of a key, one a stretch, follow one
    another and end before ``places_until_ptr``, int32 ``[B, SELECTIONS, tokens]``.
    """
    key_tiles = tl.cdiv(capacity, BLOCK_N)
    part_head = tl.program_id(0) % part_heads
    kv_head = (first_head + part_head).to(tl.int64)
    key_tile = tl.program_id(0) // part_heads % key_tiles
    stretch = tl.program_id(0) // (part_heads * key_tiles) % stretches
    batch = (tl.program_id(0) // (part_heads * key_tiles) // stretches).to(tl.int64)
    selection = batch * SELECTIONS + (kv_head if SELECTIONS > 1 else 0)
    entry = selection * stretches + stretch
    listed = tl.load(counts_ptr + entry * 2 + 1)
    if key_tile * BLOCK_N >= listed:
        return
    slot = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = slot < listed
    # Slots past the end repeat the last key, without rows.
    index = tl.load(list_ptr + entry * capacity + tl.minimum(slot, listed - 1))
    dim = tl.arange(0, D_PAD)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
    score = tl.load(scores_ptr + selection * tokens + index)
    exit = tl.load(exit_ptr + selection * tokens + index)
    exit = tl.where(is_key, exit, -1)
    enter = index + window
    start, end = stretch * STRETCH, tl.minimum(stretch * STRETCH + STRETCH, tokens)
    # Tiles of rows, counted from the stretch's start, that some keys see; all keys see those from whole to whole_end.
    tile = (tl.maximum(tl.min(enter), start) - start) // BLOCK_M
    tile_end = tl.cdiv(tl.minimum(tl.max(exit), end) - start, BLOCK_M)
    whole = tl.cdiv(tl.maximum(tl.max(enter), start) - start, BLOCK_M)
    whole_end = (tl.minimum(tl.min(exit), end) - start) // BLOCK_M
    whole = tl.minimum(whole, tile_end)
    whole_end = tl.maximum(whole, whole_end)
    n_before = whole - tile
    n_masked = n_before + tile_end - whole_end
    n_whole = whole_end - whole

    line = tl.arange(0, BLOCK_M)
    query_ptr += batch * query_stride_b + kv_head * GROUP * query_stride_h
    grad_out_ptr += batch * grad_stride_b + kv_head * GROUP * grad_stride_h
    padded_lse_ptr += (batch * KV_HEADS + kv_head) * GROUP * padded_tokens
    padded_delta_ptr += (batch * KV_HEADS + kv_head) * GROUP * padded_tokens
    padded_threshold_ptr += selection * padded_tokens
    grad_key = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    grad_value = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    grad_score = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.range(0, GROUP * n_masked):
        member = i // n_masked
        place = i % n_masked
        place = tl.where(place < n_before, tile + place, whole_end + place - n_before)
        row = start + place * BLOCK_M + line
        query, grad_out, lse, delta = rows_of_member(
            query_ptr,
            grad_out_ptr,
            padded_lse_ptr,
            padded_delta_ptr,
            member,
            row,
            tokens,
            padded_tokens,
            query_stride_h,
            query_stride_n,
            grad_stride_h,
            grad_stride_n,
            dim,
            D,
        )
        threshold = tl.load(padded_threshold_ptr + row)
        visible = (row[None, :] >= enter[:, None]) & (row[None, :] < exit[:, None])
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :])
        weights = tl.where(visible, weights, 0.0)
        gates = gate(score[:, None], threshold[None, :])
        gated = weights if GATE == "straight" else weights * gates
        grad_value = tl.dot(gated.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits, grad_gates = grad_pairs(weights, gates, grad_weights, delta[None, :], GATE)
        grad_score += tl.sum(grad_gates, 1)
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    for i in tl.range(0, GROUP * n_whole):
        row = start + (whole + i % n_whole) * BLOCK_M + line
        query, grad_out, lse, delta = rows_of_member(
            query_ptr,
            grad_out_ptr,
            padded_lse_ptr,
            padded_delta_ptr,
            i // n_whole,
            row,
            tokens,
            padded_tokens,
            query_stride_h,
            query_stride_n,
            grad_stride_h,
            grad_stride_n,
            dim,
            D,
        )
        threshold = tl.load(padded_threshold_ptr + row)
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :])
        gates = gate(score[:, None], threshold[None, :])
        gated = weights if GATE == "straight" else weights * gates
        grad_value = tl.dot(gated.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits, grad_gates = grad_pairs(weights, gates, grad_weights, delta[None, :], GATE)
        grad_score += tl.sum(grad_gates, 1)
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)

    place = tl.load(places_until_ptr + selection * tokens + index) - 1 - (exit - 1) // STRETCH + stretch
    is_key = is_key & (place < places)
    place = (batch * part_heads + part_head) * places + place
    cells = place[:, None] * (2 * D_PAD) + dim[None, :]
    tl.store(partial_ptr + cells, grad_key, mask=is_key[:, None])
    tl.store(partial_ptr + D_PAD + cells, grad_value, mask=is_key[:, None])
    tl.store(partial_scores_ptr + place, grad_score, mask=is_key)


@triton.jit
def selected_bwd_dkv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_scores_ptr,
    partial_ptr,
    partial_scores_ptr,
    exit_ptr,
    doc_end_ptr,
    places_until_ptr,
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
    tokens,
    padded_tokens,
    window,
    key_tiles,
    first_head,
    part_heads,
    places,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRETCH: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` neighbouring keys of one KV head, over the rows whose window holds them and all heads of the group;
    then what :func:`selected_bwd_stretch_kernel` left for these keys, in the order of the stretches.

    Grid: KV heads fastest (``part_heads`` of them, from ``first_head`` on), then key tiles and the batch. The gradient
    of the scores is fp32 ``[B, KV_HEADS, tokens]``.
    """
    part_head = tl.program_id(0) % part_heads
    kv_head = (first_head + part_head).to(tl.int64)
    first = tl.program_id(0) // part_heads % key_tiles * BLOCK_N
    batch = (tl.program_id(0) // part_heads // key_tiles).to(tl.int64)
    index = first + tl.arange(0, BLOCK_N)
    is_key = index < tokens
    dim = tl.arange(0, D_PAD)
    is_key_dim = is_key[:, None] & (dim < D)[None, :]
    wide_index = index.to(tl.int64)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    key = tl.load(key_ptr + wide_index[:, None] * key_stride_n + dim[None, :], mask=is_key_dim, other=0.0)
    value = tl.load(value_ptr + wide_index[:, None] * value_stride_n + dim[None, :], mask=is_key_dim, other=0.0)
    leave = tl.minimum(index + window, tokens)
    if PACKED:
        leave = tl.minimum(leave, tl.load(doc_end_ptr + index, mask=is_key, other=0))
    # Tiles of rows, counted from the key tile's start; all keys see those from whole to whole_end.
    tile_end = tl.cdiv(tl.max(leave) - first, BLOCK_M)
    whole: tl.constexpr = BLOCK_N // BLOCK_M
    n_before = tl.minimum(whole, tile_end)
    whole_end = tl.maximum((tl.min(leave) - first) // BLOCK_M, n_before)
    n_masked = n_before + tile_end - whole_end
    n_whole = whole_end - n_before

    line = tl.arange(0, BLOCK_M)
    query_ptr += batch * query_stride_b + kv_head * GROUP * query_stride_h
    grad_out_ptr += batch * grad_stride_b + kv_head * GROUP * grad_stride_h
    padded_lse_ptr += (batch * KV_HEADS + kv_head) * GROUP * padded_tokens
    padded_delta_ptr += (batch * KV_HEADS + kv_head) * GROUP * padded_tokens
    grad_key = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    grad_value = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    for i in tl.range(0, GROUP * n_masked):
        member = i // n_masked
        place = i % n_masked
        place = tl.where(place < n_before, place, whole_end + place - n_before)
        row = first + place * BLOCK_M + line
        query, grad_out, lse, delta = rows_of_member(
            query_ptr,
            grad_out_ptr,
            padded_lse_ptr,
            padded_delta_ptr,
            member,
            row,
            tokens,
            padded_tokens,
            query_stride_h,
            query_stride_n,
            grad_stride_h,
            grad_stride_n,
            dim,
            D,
        )
        visible = (row[None, :] >= index[:, None]) & (row[None, :] < leave[:, None])
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :])
        weights = tl.where(visible, weights, 0.0)
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    for i in tl.range(0, GROUP * n_whole):
        row = first + (n_before + i % n_whole) * BLOCK_M + line
        query, grad_out, lse, delta = rows_of_member(
            query_ptr,
            grad_out_ptr,
            padded_lse_ptr,
            padded_delta_ptr,
            i // n_whole,
            row,
            tokens,
            padded_tokens,
            query_stride_h,
            query_stride_n,
            grad_stride_h,
            grad_stride_n,
            dim,
            D,
        )
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :])
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)

    selection = batch * SELECTIONS + (kv_head if SELECTIONS > 1 else 0)
    exit = tl.load(exit_ptr + selection * tokens + index, mask=is_key, other=0)
    stretches = stretches_of(index + window, exit, STRETCH)
    place = tl.load(places_until_ptr + selection * tokens + index, mask=is_key, other=0) - stretches
    start = (batch * part_heads + part_head) * places
    grad_score = tl.zeros([BLOCK_N], tl.float32)
    for i in range(0, tl.max(stretches)):
        has_part = (i < stretches) & (place + i < places)
        cells = (start + place + i)[:, None] * (2 * D_PAD) + dim[None, :]
        grad_key += tl.load(partial_ptr + cells, mask=has_part[:, None], other=0.0)
        grad_value += tl.load(partial_ptr + D_PAD + cells, mask=has_part[:, None], other=0.0)
        grad_score += tl.load(partial_scores_ptr + start + place + i, mask=has_part, other=0.0)

    grad_key_ptr += batch * grad_key_stride_b + kv_head * grad_key_stride_h
    grad_value_ptr += batch * grad_value_stride_b + kv_head * grad_value_stride_h
    grad_key = (grad_key * scale).to(grad_key_ptr.dtype.element_ty)
    grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
    tl.store(grad_key_ptr + wide_index[:, None] * grad_key_stride_n + dim[None, :], grad_key, mask=is_key_dim)
    tl.store(grad_value_ptr + wide_index[:, None] * grad_value_stride_n + dim[None, :], grad_value, mask=is_key_dim)
    tl.store(grad_scores_ptr + (batch * KV_HEADS + kv_head) * tokens + index, grad_score, mask=is_key)


@triton.jit
def stretches_of(enter, exit, STRETCH: tl.constexpr):
    """How many stretches the rows ``[enter, exit)`` meet."""
    return tl.where(exit > enter, (exit - 1) // STRETCH - enter // STRETCH + 1, 0)


@triton.jit
def rows_of_member(
    query_ptr,
    grad_out_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    member,
    row,
    tokens,
    padded_tokens,
    query_stride_h,
    query_stride_n,
    grad_stride_h,
    grad_stride_n,
    dim,
    D: tl.constexpr,
):
    """The rows ``row`` of query head ``member`` of the group: query, output gradient, log-sum-exp and delta."""
    wide = tl.cast(member, tl.int64)
    wide_row = row.to(tl.int64)
    mask = (row < tokens)[:, None] & (dim < D)[None, :]
    query_cells = query_ptr + wide * query_stride_h + wide_row[:, None] * query_stride_n + dim[None, :]
    grad_cells = grad_out_ptr + wide * grad_stride_h + wide_row[:, None] * grad_stride_n + dim[None, :]
    query = tl.load(query_cells, mask=mask, other=0.0)
    grad_out = tl.load(grad_cells, mask=mask, other=0.0)
    lse = tl.load(padded_lse_ptr + wide * padded_tokens + row)
    delta = tl.load(padded_delta_ptr + wide * padded_tokens + row)
    return query, grad_out, lse, delta


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
