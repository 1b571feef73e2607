"""The backward kernels over keys: dK and dV, without atomics.

First, for each tile of keys, what ``grad_rows.py`` left for them, tile of rows by tile of rows in their order; then the
rows that see the keys as neighbours. Lists ascend, so that a tile's keys are one stretch of each.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.listed_keys.triton.work import FIELDS, segment_bounds
from sparsetrain_kernels.online_softmax import LOG2E


@triton.jit(do_not_specialize=["first_tile", "part_tiles", "first_head", "part_heads", "steps"])
def listed_bwd_sum_kernel(
    partial_ptr,
    sums_ptr,
    keys_ptr,
    counts_ptr,
    tiles_ptr,
    key_tiles_ptr,
    tokens,
    segments,
    first_tile,
    part_tiles,
    first_head,
    part_heads,
    capacity,
    key_tiles,
    steps,
    KV_HEADS: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    ENTRIES: tl.constexpr,
    PACKED: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` neighbouring keys of one KV head: adds to ``sums_ptr``, fp32 ``[B, part_heads, tokens, 2, D_PAD]``,
    or, with ``FIRST``, writes it. Grid: key tiles fastest, then KV heads and the batch. A search of ``steps`` halvings
    finds where the keys stand in the lists of ``TILES`` tiles of rows at a time."""
    key_tile = tl.program_id(0) % key_tiles
    part_head = tl.program_id(0) // key_tiles % part_heads
    batch = (tl.program_id(0) // key_tiles // part_heads).to(tl.int64)
    start, end = key_tile_bounds(key_tiles_ptr, key_tile, tokens, BLOCK_N, PACKED)
    if start >= end:
        return
    place = (batch * KV_HEADS + first_head + part_head) * segments
    keys_ptr += place * capacity
    counts_ptr += place
    partial_ptr += (batch * part_heads + part_head) * part_tiles * capacity * (2 * D_PAD)
    wide = tl.arange(0, 2 * D_PAD)
    row = tl.arange(0, BLOCK_N)
    cells = ((batch * part_heads + part_head) * tokens + start + row)[:, None] * (2 * D_PAD) + wide[None, :]
    is_cell = (start + row < end)[:, None]
    acc = tl.zeros([BLOCK_N, 2 * D_PAD], tl.float32)
    if not FIRST:
        acc = tl.load(sums_ptr + cells, mask=is_cell, other=0.0)
    slot = tl.arange(0, TILES)
    entry = tl.arange(0, ENTRIES)
    # Tiles before that of the first key's row read earlier keys alone.
    tile = first_tile
    beyond = first_tile + part_tiles
    while tile < beyond:
        middle = (tile + beyond) // 2
        is_before = tl.load(tiles_ptr + middle * FIELDS + 1) < start
        tile = tl.where(is_before, middle + 1, tile)
        beyond = tl.where(is_before, beyond, middle)
    last_tile = first_tile + part_tiles
    for from_tile in range(tile, last_tile, TILES):
        own = from_tile + slot
        exists = own < last_tile
        segment = tl.load(tiles_ptr + own * FIELDS, mask=exists, other=0)
        exists = exists & (tl.load(tiles_ptr + own * FIELDS + 1, mask=exists, other=tokens) < tokens)
        count = tl.load(counts_ptr + segment, mask=exists, other=0)
        own_keys = keys_ptr + segment.to(tl.int64) * capacity
        low = _places_before(own_keys, start, count, steps)
        number = _places_before(own_keys, end, count, steps) - low
        until = tl.cumsum(number, 0)
        shift = low - (until - number)
        for at in range(0, tl.sum(number, 0), ENTRIES):
            of = at + entry
            # The tile of each entry, and its place in that tile's list.
            is_later = until[None, :] <= of[:, None]
            of_slot = tl.sum(is_later.to(tl.int32), 1)
            is_entry = of_slot < TILES
            is_slot = of_slot[:, None] == slot[None, :]
            in_list = of + tl.sum(tl.where(is_slot, shift[None, :], 0), 1)
            of_segment = tl.sum(tl.where(is_slot, segment[None, :], 0), 1)
            index = tl.load(keys_ptr + of_segment.to(tl.int64) * capacity + in_list, mask=is_entry, other=-1) - start
            source = (from_tile - first_tile + of_slot).to(tl.int64) * capacity + in_list
            part = tl.load(
                partial_ptr + source[:, None] * (2 * D_PAD) + wide[None, :], mask=is_entry[:, None], other=0.0
            )
            is_own = (row[:, None] == index[None, :]).to(part.dtype)
            acc = tl.dot(is_own, part, acc, input_precision=PRECISION)
    tl.store(sums_ptr + cells, acc, mask=is_cell)


@triton.jit
def _places_before(list_ptr, key, count, steps):
    """How many entries of each list are before ``key``, by halving."""
    low = tl.zeros_like(count)
    high = count
    for _ in range(0, steps):
        middle = (low + high) // 2
        is_open = low < high
        is_before = is_open & (tl.load(list_ptr + middle, mask=is_open, other=0) < key)
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    return low


@triton.jit
def key_tile_bounds(key_tiles_ptr, key_tile, tokens, BLOCK_N: tl.constexpr, PACKED: tl.constexpr):
    """The first key of a tile, and the one past its last; tiles start with their document."""
    if PACKED:
        start = tl.load(key_tiles_ptr + key_tile * 2)
        return start, tl.load(key_tiles_ptr + key_tile * 2 + 1)
    start = key_tile * BLOCK_N
    return start, tl.minimum(start + BLOCK_N, tokens)


@triton.jit(do_not_specialize=["first_head", "part_heads", "steps"])
def listed_bwd_keys_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    sums_ptr,
    cu_ptr,
    skip_ptr,
    doc_start_ptr,
    doc_end_ptr,
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
    tokens,
    segments,
    window,
    first_head,
    part_heads,
    key_tiles,
    steps,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` neighbouring keys of one KV head, over the rows that have them in their own range and all heads of
    the group; with what :func:`listed_bwd_sum_kernel` left for them, the gradients. Grid: key tiles fastest, then KV
    heads and the batch."""
    key_tile = tl.program_id(0) % key_tiles
    part_head = tl.program_id(0) // key_tiles % part_heads
    batch = (tl.program_id(0) // key_tiles // part_heads).to(tl.int64)
    kv_head = (first_head + part_head).to(tl.int64)
    start, end = key_tile_bounds(key_tiles_ptr, key_tile, tokens, BLOCK_N, PACKED)
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

    # The last segment whose own range begins at a key or before it: rows up to its end see the key.
    low = tl.zeros_like(index)
    high = tl.full([BLOCK_N], 0, tl.int32) + segments
    for _ in range(0, steps):
        middle = (low + high) // 2
        is_open = low < high
        first, _end, _low, _document = segment_bounds(
            cu_ptr, skip_ptr, doc_start_ptr, tl.where(is_open, middle, segments), segments, tokens, window, PACKED
        )
        is_before = is_open & (first - window <= index)
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    leave = tl.load(cu_ptr + low, mask=is_key & (low > 0), other=0)
    if PACKED:
        leave = tl.minimum(leave, tl.load(doc_end_ptr + index, mask=is_key, other=0))
    last = tl.max(leave, 0)

    line = tl.arange(0, BLOCK_M)
    query_ptr += batch * query_stride_b + kv_head * GROUP * query_stride_h
    grad_out_ptr += batch * grad_stride_b + kv_head * GROUP * grad_stride_h
    statistic = (batch * KV_HEADS + kv_head) * GROUP * tokens
    grad_key = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    grad_value = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    row_tiles = tl.cdiv(tl.maximum(last - start, 0), BLOCK_M)
    for i in tl.range(0, GROUP * row_tiles):
        member = tl.cast(i // row_tiles, tl.int64)
        row = start + i % row_tiles * BLOCK_M + line
        wide_row = row.to(tl.int64)
        is_row = row < last
        # Rows that are not computed have an infinite log-sum-exp, and may hold anything.
        lse = tl.load(lse_ptr + statistic + member * tokens + row, mask=is_row, other=float("inf"))
        delta = tl.load(delta_ptr + statistic + member * tokens + row, mask=is_row, other=0.0)
        is_computed = lse < float("inf")
        mask = is_computed[:, None] & (dim < D)[None, :]
        query_cells = query_ptr + member * query_stride_h + wide_row[:, None] * query_stride_n + dim[None, :]
        grad_cells = grad_out_ptr + member * grad_stride_h + wide_row[:, None] * grad_stride_n + dim[None, :]
        query = tl.load(query_cells, mask=mask, other=0.0)
        grad_out = tl.load(grad_cells, mask=mask, other=0.0)
        visible = is_computed[None, :] & (row[None, :] >= index[:, None]) & (row[None, :] < leave[:, None])
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :])
        weights = tl.where(visible, weights, 0.0)
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        # A key that no row sees may be NaN.
        grad_logits = tl.where(visible, weights * (grad_weights - delta[None, :]), 0.0)
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)

    cells = ((batch * part_heads + part_head) * tokens + index)[:, None] * (2 * D_PAD) + dim[None, :]
    grad_key += tl.load(sums_ptr + cells, mask=is_key[:, None], other=0.0)
    grad_value += tl.load(sums_ptr + D_PAD + cells, mask=is_key[:, None], other=0.0)
    grad_key_ptr += batch * grad_key_stride_b + kv_head * grad_key_stride_h
    grad_value_ptr += batch * grad_value_stride_b + kv_head * grad_value_stride_h
    grad_key = (grad_key * scale).to(grad_key_ptr.dtype.element_ty)
    grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
    tl.store(grad_key_ptr + wide_index[:, None] * grad_key_stride_n + dim[None, :], grad_key, mask=is_key_dim)
    tl.store(grad_value_ptr + wide_index[:, None] * grad_value_stride_n + dim[None, :], grad_value, mask=is_key_dim)
