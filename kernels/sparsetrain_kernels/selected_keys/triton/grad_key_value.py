"""The backward kernels over keys: dK, dV and the gradient of scores, without atomics.

First over stretches of rows, each with its list of keys; then what these leave for a key is summed, and the kernel over
windows adds it.

Both recompute the weights from the saved log-sum-exp. ``delta`` is the sum of each row's ``grad_out * out``. Tensors
whose names begin with ``padded`` have whole tiles of rows (``row_stats.py``).
"""

import triton
import triton.language as tl

from sparsetrain_kernels.gathered_rows import gather
from sparsetrain_kernels.key_lists.triton.gates import gate, grad_pairs
from sparsetrain_kernels.online_softmax import LOG2E
from sparsetrain_kernels.selected_keys.triton.row_stats import stretches_of


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
    listed = tl.load(counts_ptr + entry)
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
    # What does not exist may see anything: it is not stored.
    whole_end = (tl.minimum(tl.min(tl.where(is_key, exit, end)), end) - start) // BLOCK_M
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
def selected_bwd_sum_kernel(
    partial_ptr,
    partial_scores_ptr,
    exit_ptr,
    places_until_ptr,
    tokens,
    window,
    key_tiles,
    first_head,
    part_heads,
    places,
    SELECTIONS: tl.constexpr,
    D_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """What :func:`selected_bwd_stretch_kernel` left for ``KEYS`` keys of one KV head, into the first place of each key:
    ``PARTS`` stretches at a time, in their order. Most keys are selected in none. Grid: key tiles fastest, then KV
    heads and the batch."""
    first = tl.program_id(0) % key_tiles * KEYS
    part_head = tl.program_id(0) // key_tiles % part_heads
    batch = (tl.program_id(0) // key_tiles // part_heads).to(tl.int64)
    selection = batch * SELECTIONS + (first_head + part_head if SELECTIONS > 1 else 0)
    exit_ptr += selection * tokens
    places_until_ptr += selection * tokens
    index = first + tl.arange(0, KEYS)
    exit = tl.load(exit_ptr + index, mask=index < tokens, other=0)
    if tl.max(stretches_of(index + window, exit, STRETCH)) < 2:
        return
    start = (batch * part_heads + part_head) * places
    dim = tl.arange(0, 2 * D_PAD)
    for key in range(first, tl.minimum(first + KEYS, tokens)):
        stretches = stretches_of(key + window, tl.load(exit_ptr + key), STRETCH)
        if stretches > 1:
            place = tl.load(places_until_ptr + key) - stretches
            stretches = tl.minimum(stretches, places - place)
            total = tl.zeros([2 * D_PAD], tl.float32)
            total_score = 0.0
            for i in range(0, stretches, PARTS):
                part = i + tl.arange(0, PARTS)
                cells = (start + place + part)[:, None] * (2 * D_PAD) + dim[None, :]
                total += tl.sum(tl.load(partial_ptr + cells, mask=(part < stretches)[:, None], other=0.0), 0)
                scores = tl.load(partial_scores_ptr + start + place + part, mask=part < stretches, other=0.0)
                total_score += tl.sum(scores, 0)
            tl.debug_barrier()
            if stretches > 0:
                tl.store(partial_ptr + (start + place) * (2 * D_PAD) + dim, total)
                tl.store(partial_scores_ptr + start + place, total_score)


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
    then the sums that :func:`selected_bwd_sum_kernel` left for these keys.

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
    has_part = (stretches > 0) & (place < places)
    cells = (start + place)[:, None] * (2 * D_PAD) + dim[None, :]
    grad_key += tl.load(partial_ptr + cells, mask=has_part[:, None], other=0.0)
    grad_value += tl.load(partial_ptr + D_PAD + cells, mask=has_part[:, None], other=0.0)
    grad_score = tl.load(partial_scores_ptr + start + place, mask=has_part, other=0.0)

    grad_key_ptr += batch * grad_key_stride_b + kv_head * grad_key_stride_h
    grad_value_ptr += batch * grad_value_stride_b + kv_head * grad_value_stride_h
    grad_key = (grad_key * scale).to(grad_key_ptr.dtype.element_ty)
    grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
    tl.store(grad_key_ptr + wide_index[:, None] * grad_key_stride_n + dim[None, :], grad_key, mask=is_key_dim)
    tl.store(grad_value_ptr + wide_index[:, None] * grad_value_stride_n + dim[None, :], grad_value, mask=is_key_dim)
    tl.store(grad_scores_ptr + (batch * KV_HEADS + kv_head) * tokens + index, grad_score, mask=is_key)


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
