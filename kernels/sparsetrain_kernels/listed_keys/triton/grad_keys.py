"""The backward kernels over keys: dK and dV, without atomics.

First what ``grad_rows.py`` left is brought in order by tile of keys. Lists ascend, so that a tile's keys are one
stretch of each, between two places; counts of all stretches, summed up, say where each goes. Then it is added, and then
come the rows that see the keys as neighbours.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.key_lists.triton.tiles import FIELDS
from sparsetrain_kernels.listed_keys.triton.work import segment_bounds
from sparsetrain_kernels.online_softmax import LOG2E


@triton.jit(do_not_specialize=["first_tile", "part_tiles", "first_head", "part_heads", "steps"])
def listed_bwd_places_kernel(
    places_ptr,
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
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    BOUNDS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Where the first key of each tile of keys stands in the lists of ``TILES`` tiles of rows: int32 ``[B, part_heads,
    key_tiles + 1, part_tiles]``, the last of them the lists' counts. A search of ``steps`` halvings for ``BOUNDS``
    tiles of keys. Grid: tiles of rows fastest, then tiles of keys, KV heads and the batch."""
    groups = tl.cdiv(part_tiles, TILES)
    spans = tl.cdiv(key_tiles + 1, BOUNDS)
    own = tl.program_id(0) % groups * TILES + tl.arange(0, TILES)
    bound = tl.program_id(0) // groups % spans * BOUNDS + tl.arange(0, BOUNDS)
    part_head = tl.program_id(0) // groups // spans % part_heads
    batch = (tl.program_id(0) // groups // spans // part_heads).to(tl.int64)
    is_tile = own < part_tiles
    cell = tiles_ptr + (first_tile + own) * FIELDS
    segment = tl.load(cell, mask=is_tile, other=0)
    # Empty tiles come after all rows.
    exists = is_tile & (tl.load(cell + 1, mask=is_tile, other=tokens) < tokens)
    place = (batch * KV_HEADS + first_head + part_head) * segments + segment
    count = tl.load(counts_ptr + place, mask=exists, other=0)
    is_bound = bound < key_tiles
    if PACKED:
        start = tl.load(key_tiles_ptr + bound * 2, mask=is_bound, other=tokens)
        start = tl.where(tl.load(key_tiles_ptr + bound * 2 + 1, mask=is_bound, other=0) > start, start, tokens)
    else:
        start = tl.where(is_bound, bound * BLOCK_N, tokens)
    lists = (keys_ptr + place * capacity)[:, None]
    low = tl.zeros([TILES, BOUNDS], tl.int32)
    high = low + count[:, None]
    for _ in range(0, steps):
        middle = (low + high) // 2
        is_open = low < high
        is_before = is_open & (tl.load(lists + middle, mask=is_open, other=0) < start[None, :])
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    places_ptr += (batch * part_heads + part_head) * (key_tiles + 1) * part_tiles
    cells = places_ptr + bound.to(tl.int64)[None, :] * part_tiles + own[:, None]
    tl.store(cells, low, mask=is_tile[:, None] & (bound <= key_tiles)[None, :])


@triton.jit(do_not_specialize=["first_tile", "part_tiles", "first_head", "part_heads"])
def listed_bwd_order_kernel(
    order_ptr,
    until_ptr,
    places_ptr,
    keys_ptr,
    counts_ptr,
    tiles_ptr,
    key_tile_of_ptr,
    key_tiles_ptr,
    tokens,
    segments,
    first_tile,
    part_tiles,
    first_head,
    part_heads,
    capacity,
    key_tiles,
    KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The entries of the lists of a part's tiles of rows by tile of keys, and there in the order of the lists: int32
    ``[B, part_heads, part_tiles * capacity]``, of each its place among the partial sums times ``BLOCK_N`` and its key
    in the tile. ``until_ptr``, int32 ``[B, part_heads, key_tiles, part_tiles]``, has the sums of the counts up to each.
    Grid: tiles of rows fastest, then KV heads and the batch."""
    part_tile = tl.program_id(0) % part_tiles
    part_head = tl.program_id(0) // part_tiles % part_heads
    batch = (tl.program_id(0) // part_tiles // part_heads).to(tl.int64)
    cell = tiles_ptr + (first_tile + part_tile) * FIELDS
    if tl.load(cell + 1) >= tokens:
        return
    place = (batch * KV_HEADS + first_head + part_head) * segments + tl.load(cell)
    keys_ptr += place * capacity
    count = tl.load(counts_ptr + place)
    part = batch * part_heads + part_head
    order_ptr += part * part_tiles * capacity
    until_ptr += part * key_tiles * part_tiles + part_tile
    places_ptr += part * (key_tiles + 1) * part_tiles + part_tile
    for start in range(0, count, SCAN):
        entry = start + tl.arange(0, SCAN)
        is_entry = entry < count
        key = tl.load(keys_ptr + entry, mask=is_entry, other=0)
        if PACKED:
            key_tile = tl.load(key_tile_of_ptr + key, mask=is_entry, other=0)
            in_tile = key - tl.load(key_tiles_ptr + key_tile * 2, mask=is_entry, other=0)
        else:
            key_tile = key // BLOCK_N
            in_tile = key % BLOCK_N
        # Those of this tile of keys in this list end where the next ones begin.
        to = key_tile.to(tl.int64) * part_tiles
        behind = tl.load(places_ptr + to + part_tiles, mask=is_entry, other=0) - entry
        target = tl.load(until_ptr + to, mask=is_entry, other=0) - behind
        tl.store(order_ptr + target, (part_tile * capacity + entry) * BLOCK_N + in_tile, mask=is_entry)


@triton.jit(do_not_specialize=["part_tiles", "part_heads"])
def listed_bwd_sum_kernel(
    partial_ptr,
    sums_ptr,
    order_ptr,
    until_ptr,
    key_tiles_ptr,
    tokens,
    part_tiles,
    part_heads,
    capacity,
    key_tiles,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr,
    PACKED: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` neighbouring keys of one KV head: adds to ``sums_ptr``, fp32 ``[B, part_heads, tokens, 2, D_PAD]``,
    or, with ``FIRST``, writes it. Grid: keys or values fastest, then key tiles, KV heads and the batch. ``ENTRIES`` are
    added at a time, by a product with a matrix of zeros and ones."""
    half = tl.program_id(0) % 2
    key_tile = tl.program_id(0) // 2 % key_tiles
    part = (tl.program_id(0) // 2 // key_tiles).to(tl.int64)
    start, end = key_tile_bounds(key_tiles_ptr, key_tile, tokens, BLOCK_N, PACKED)
    if start >= end:
        return
    partial_ptr += part * part_tiles * capacity * (2 * D_PAD) + half * D_PAD
    order_ptr += part * part_tiles * capacity
    until_ptr += (part * key_tiles + key_tile) * part_tiles
    first = tl.load(until_ptr - 1, mask=key_tile > 0, other=0)
    last = tl.load(until_ptr + part_tiles - 1)
    if not FIRST and first >= last:
        # There is nothing to add, as in parts of empty tiles of rows.
        return
    dim = tl.arange(0, D_PAD)
    row = tl.arange(0, BLOCK_N)
    cells = (part * tokens + start + row)[:, None] * (2 * D_PAD) + (half * D_PAD + dim)[None, :]
    is_cell = (start + row < end)[:, None]
    acc = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    if not FIRST:
        acc = tl.load(sums_ptr + cells, mask=is_cell, other=0.0)
    entry = tl.arange(0, ENTRIES)
    for at in tl.range(first, last, ENTRIES):
        is_entry = at + entry < last
        found = tl.load(order_ptr + at + entry, mask=is_entry, other=0)
        # A part of all tiles has fewer than 2^31 elements.
        source = found // BLOCK_N * (2 * D_PAD)
        # Read once: evicted first, so that the sums and the order stay in L2.
        parts = partial_ptr + (source[:, None] + dim[None, :])
        added = tl.load(parts, mask=is_entry[:, None], other=0.0, eviction_policy="evict_first")
        is_own = (row[:, None] == (found % BLOCK_N)[None, :]).to(added.dtype)
        acc = tl.dot(is_own, added, acc, input_precision=PRECISION)
    tl.store(sums_ptr + cells, acc, mask=is_cell)


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
