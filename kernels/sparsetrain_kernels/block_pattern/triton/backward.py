"""The backward kernels: dQ over the lists of the query tiles, dK and dV over their transpose. No atomics.

All recompute the weights from the saved log-sum-exp. ``delta`` is the sum of each row's ``grad_out * out``, less the
gradient of its log-sum-exp.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.block_pattern.triton.geometry import (
    key_block_at,
    key_list,
    place_of,
    query_block_at,
    query_list,
    read_item,
)
from sparsetrain_kernels.online_softmax import LOG2E, tanh


@triton.jit
def block_pattern_bwd_dq_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    grad_query_ptr,
    far_ptr,
    items_ptr,
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
    items,
    padded_rows,
    q_start,
    window,
    sinks,
    period,
    far_stride_h,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_M`` query rows of one head, over the same key tiles and on the same grid as the forward kernel."""
    KEY_TILES: tl.constexpr = (BLOCK + BLOCK_N - 1) // BLOCK_N
    QUERY_TILES: tl.constexpr = (BLOCK + BLOCK_M - 1) // BLOCK_M
    head, item, batch = place_of(tl.program_id(0), items, HEADS)
    document, length, tile, _, padded = read_item(items_ptr, item)
    if tile < 0:
        return

    query_block = tile // QUERY_TILES
    offset = tile % QUERY_TILES * BLOCK_M
    in_block = offset + tl.arange(0, BLOCK_M)
    position = query_block * BLOCK + in_block
    is_row = (position >= q_start) & (position < length)
    if BLOCK % BLOCK_M != 0:
        is_row = is_row & (in_block < BLOCK)
    row = document + position - q_start
    dim = tl.arange(0, D_PAD)
    is_query = is_row[:, None] & (dim < D)[None, :]
    query_ptr += batch * query_stride_b + head.to(tl.int64) * query_stride_h
    query = tl.load(query_ptr + row[:, None] * query_stride_n + dim[None, :], mask=is_query, other=0.0)
    grad_out_ptr += batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    grad_out = tl.load(grad_out_ptr + row[:, None] * grad_stride_n + dim[None, :], mask=is_query, other=0.0)
    padded_row = (batch * HEADS + head) * padded_rows + (padded + query_block - q_start // BLOCK) * PAD_BLOCK + in_block
    lse = tl.load(padded_lse_ptr + padded_row)
    delta = tl.load(padded_delta_ptr + padded_row)

    kv_head = (head // GROUP).to(tl.int64)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h + document * key_stride_n
    value_ptr += batch * value_stride_b + kv_head * value_stride_h + document * value_stride_n
    column = tl.arange(0, BLOCK_N)
    key_cells = column[:, None] * key_stride_n + dim[None, :]
    value_cells = column[None, :] * value_stride_n + dim[:, None]
    far_ptr += kv_head * far_stride_h + query_block % period * FAR
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    n_sink, n_far, first = key_list(far_ptr, query_block, window, sinks, FAR)
    before_own = (n_sink + n_far + query_block - first) * KEY_TILES
    for i in tl.range(0, before_own + offset // BLOCK_N):
        key_block = key_block_at(far_ptr, i // KEY_TILES, query_block, n_sink, n_far, first)
        in_key_block = i % KEY_TILES * BLOCK_N
        start = (key_block * BLOCK + in_key_block).to(tl.int64)
        key_start = key_ptr + start * key_stride_n + key_cells
        value_start = value_ptr + start * value_stride_n + value_cells
        if BLOCK % BLOCK_N == 0 and D == D_PAD:
            key = tl.load(key_start)
            value = tl.load(value_start)
        else:
            is_key = in_key_block + column < BLOCK
            key = tl.load(key_start, mask=is_key[:, None] & (dim < D)[None, :], other=0.0)
            value = tl.load(value_start, mask=is_key[None, :] & (dim < D)[:, None], other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        weights, slope = _weights(logits, lse[:, None], scale, softcap, SOFTCAP)
        if BLOCK % BLOCK_N != 0:
            weights = tl.where((in_key_block + column < BLOCK)[None, :], weights, 0.0)
        grad_weights = tl.dot(grad_out, value, input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[:, None])
        if SOFTCAP:
            grad_logits *= slope
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
    for i in tl.range(0, BLOCK_M // BLOCK_N):
        in_key_block = offset + i * BLOCK_N + column
        start = (query_block * BLOCK + offset + i * BLOCK_N).to(tl.int64)
        is_key = (in_key_block < BLOCK) & (query_block * BLOCK + in_key_block < length)
        key_start = key_ptr + start * key_stride_n + key_cells
        value_start = value_ptr + start * value_stride_n + value_cells
        key = tl.load(key_start, mask=is_key[:, None] & (dim < D)[None, :], other=0.0)
        value = tl.load(value_start, mask=is_key[None, :] & (dim < D)[:, None], other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        weights, slope = _weights(logits, lse[:, None], scale, softcap, SOFTCAP)
        visible = (in_key_block[None, :] <= in_block[:, None]) & is_key[None, :]
        weights = tl.where(visible, weights, 0.0)
        grad_weights = tl.dot(grad_out, value, input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[:, None])
        if SOFTCAP:
            grad_logits *= slope
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)

    grad_query_ptr += batch * grad_query_stride_b + head.to(tl.int64) * grad_query_stride_h
    grad_query = (acc * scale).to(grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + row[:, None] * grad_query_stride_n + dim[None, :], grad_query, mask=is_query)


@triton.jit
def block_pattern_bwd_dkv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    partial_ptr,
    far_ptr,
    items_ptr,
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
    items,
    split_items,
    padded_rows,
    q_start,
    q_end,
    window,
    sinks,
    period,
    far_stride_h,
    chunk,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAR: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` keys of one KV head, over the query tiles that read them and all heads of the group; ``BLOCK_N`` is a
    multiple of ``BLOCK_M``. Grid: KV heads fastest, then items, then the batch: the chunks of the sinks, the longest
    columns, come first.

    Logits are formed transposed, keys by queries: transposing an accumulator is miscompiled by Triton before 3.7.1 on
    Hopper. A chunk of a split sink tile leaves fp32 sums in ``partial_ptr``, ``[B, KV_HEADS, split_items, 2, BLOCK_N,
    D_PAD]``, for :func:`block_pattern_bwd_sum_kernel`.
    """
    KEY_TILES: tl.constexpr = (BLOCK + BLOCK_N - 1) // BLOCK_N
    QUERY_TILES: tl.constexpr = (BLOCK + BLOCK_M - 1) // BLOCK_M
    kv_head, item, batch = place_of(tl.program_id(0), items, KV_HEADS)
    kv_head = kv_head.to(tl.int64)
    document, length, tile, piece, padded = read_item(items_ptr, item)
    if tile < 0:
        return

    key_block = tile // KEY_TILES
    offset = tile % KEY_TILES * BLOCK_N
    in_block = offset + tl.arange(0, BLOCK_N)
    position = key_block * BLOCK + in_block
    is_key = (in_block < BLOCK) & (position < length)
    dim = tl.arange(0, D_PAD)
    is_key_dim = is_key[:, None] & (dim < D)[None, :]
    key_row = document + position
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    # Keys after the last query are not read: a cache may hold anything there.
    last_row = (length if PACKED else q_end) - 1
    is_read = is_key_dim & (position <= last_row)[:, None]
    key = tl.load(key_ptr + key_row[:, None] * key_stride_n + dim[None, :], mask=is_read, other=0.0)
    value = tl.load(value_ptr + key_row[:, None] * value_stride_n + dim[None, :], mask=is_read, other=0.0)
    grad_key = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    grad_value = tl.zeros([BLOCK_N, D_PAD], tl.float32)

    first_block, last_block = q_start // BLOCK, last_row // BLOCK
    if piece >= 0:
        first_block = tl.maximum(first_block, piece * chunk)
        last_block = tl.minimum(last_block, piece * chunk + chunk - 1)
    far_ptr += kv_head * far_stride_h + key_block % period * FAR
    first, n_near, before, n_far = query_list(far_ptr, key_block, window, sinks, first_block, last_block, FAR)
    # The tiles of the call's last block that hold no rows are not there; where that block is listed, it is the last.
    last = tl.load(far_ptr + before + n_far - 1, mask=n_far > 0, other=0)
    last = tl.where(n_far > 0, key_block + last, first + n_near - 1)
    absent = tl.where(last == last_row // BLOCK, QUERY_TILES - tl.cdiv(last_row % BLOCK + 1, BLOCK_M), 0)
    end = (n_near + n_far) * QUERY_TILES - absent
    # In the own block, the query tiles before the key tile see none of it, and those beside it see a part.
    has_own = (first == key_block) & (n_near > 0)
    skipped = tl.where(has_own, offset // BLOCK_M, 0)
    beside = tl.minimum(tl.minimum(BLOCK_N // BLOCK_M, QUERY_TILES - skipped), end - skipped)
    masked = tl.where(has_own, tl.maximum(beside, 0), 0)

    line = tl.arange(0, BLOCK_M)
    query_ptr += batch * query_stride_b + kv_head * GROUP * query_stride_h
    grad_out_ptr += batch * grad_stride_b + kv_head * GROUP * grad_stride_h
    query_cells = line[:, None] * query_stride_n + dim[None, :]
    grad_cells = line[:, None] * grad_stride_n + dim[None, :]
    padded_start = (batch * KV_HEADS + kv_head) * GROUP * padded_rows + (padded - q_start // BLOCK) * PAD_BLOCK
    padded_lse_ptr += padded_start
    padded_delta_ptr += padded_start
    for i in tl.range(0, GROUP * masked):
        member = i // masked
        tile_in_block = skipped + i % masked
        in_query_block = tile_in_block * BLOCK_M + line
        q_position = key_block * BLOCK + in_query_block
        is_row = (in_query_block < BLOCK) & (q_position >= q_start) & (q_position <= last_row)
        start = document + key_block * BLOCK + tile_in_block * BLOCK_M - q_start
        mask = is_row[:, None] & (dim < D)[None, :]
        wide = tl.cast(member, tl.int64)
        query_start = query_ptr + wide * query_stride_h + start * query_stride_n
        grad_start = grad_out_ptr + wide * grad_stride_h + start * grad_stride_n
        query = tl.load(query_start + query_cells, mask=mask, other=0.0)
        grad_out = tl.load(grad_start + grad_cells, mask=mask, other=0.0)
        padded_row = wide * padded_rows + key_block * PAD_BLOCK + tile_in_block * BLOCK_M + line
        lse = tl.load(padded_lse_ptr + padded_row)
        delta = tl.load(padded_delta_ptr + padded_row)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        weights, slope = _weights(logits, lse[None, :], scale, softcap, SOFTCAP)
        weights = tl.where(in_block[:, None] <= in_query_block[None, :], weights, 0.0)
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[None, :])
        if SOFTCAP:
            grad_logits *= slope
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    full = tl.maximum(end - skipped - masked, 0)
    member, place = 0, skipped + masked
    for _ in tl.range(0, GROUP * full):
        query_block = query_block_at(far_ptr, place // QUERY_TILES, key_block, first, n_near, before, n_far)
        in_query_block = place % QUERY_TILES * BLOCK_M + line
        q_position = query_block * BLOCK + in_query_block
        is_row = (q_position >= q_start) & (q_position <= last_row)
        if BLOCK % BLOCK_M != 0:
            is_row = is_row & (in_query_block < BLOCK)
        start = document + query_block * BLOCK + place % QUERY_TILES * BLOCK_M - q_start
        mask = is_row[:, None] & (dim < D)[None, :]
        wide = tl.cast(member, tl.int64)
        query_start = query_ptr + wide * query_stride_h + start * query_stride_n
        grad_start = grad_out_ptr + wide * grad_stride_h + start * grad_stride_n
        query = tl.load(query_start + query_cells, mask=mask, other=0.0)
        grad_out = tl.load(grad_start + grad_cells, mask=mask, other=0.0)
        padded_row = wide * padded_rows + query_block * PAD_BLOCK + place % QUERY_TILES * BLOCK_M + line
        lse = tl.load(padded_lse_ptr + padded_row)
        delta = tl.load(padded_delta_ptr + padded_row)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        weights, slope = _weights(logits, lse[None, :], scale, softcap, SOFTCAP)
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - delta[None, :])
        if SOFTCAP:
            grad_logits *= slope
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
        place += 1
        member = tl.where(place == end, member + 1, member)
        place = tl.where(place == end, skipped + masked, place)

    grad_key *= scale
    if item < split_items:
        partial_ptr += ((batch * KV_HEADS + kv_head) * split_items + item) * (2 * BLOCK_N * D_PAD)
        cells = tl.arange(0, BLOCK_N)[:, None] * D_PAD + dim[None, :]
        tl.store(partial_ptr + cells, grad_key)
        tl.store(partial_ptr + BLOCK_N * D_PAD + cells, grad_value)
    else:
        key_cells = batch * grad_key_stride_b + kv_head * grad_key_stride_h + key_row[:, None] * grad_key_stride_n
        value_cells = (
            batch * grad_value_stride_b + kv_head * grad_value_stride_h + key_row[:, None] * grad_value_stride_n
        )
        tl.store(grad_key_ptr + key_cells + dim[None, :], grad_key.to(grad_key_ptr.dtype.element_ty), mask=is_key_dim)
        tl.store(
            grad_value_ptr + value_cells + dim[None, :], grad_value.to(grad_value_ptr.dtype.element_ty), mask=is_key_dim
        )


@triton.jit
def _weights(logits, lse, scale, softcap, SOFTCAP: tl.constexpr):
    """The softmax of raw products, with ``lse`` in units of log2, and the slope of the soft cap (1 without)."""
    if SOFTCAP:
        capped = tanh(logits * (scale / softcap))
        weights = tl.exp2(capped * (softcap * LOG2E) - lse)
        slope = 1.0 - capped * capped
    else:
        weights = tl.exp2(logits * (scale * LOG2E) - lse)
        slope = 1.0
    return weights, slope
