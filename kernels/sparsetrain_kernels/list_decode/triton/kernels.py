"""The kernels: each program attends to an even share of the keys of all lists, then the parts of a row are merged."""

import triton
import triton.language as tl

from sparsetrain_kernels.online_softmax import LOG2E, accumulate_gated, tanh


@triton.jit
def key_bounds(length, recent, sinks):
    """Of a sequence: how many of its first tokens are attended in any case, and from where on its last ones are."""
    length = tl.maximum(length, 0)
    first = tl.minimum(sinks, length)
    return first, tl.minimum(tl.maximum(length - recent, first), length)


@triton.jit
def tile_ends(
    counts_ptr,
    lengths_ptr,
    recents_ptr,
    since_ptr,
    recent,
    sinks,
    capacity,
    items,
    KV_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    SINCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEMS_PAD: tl.constexpr,
):
    """The key tiles of all KV heads of all sequences (items) in one row: where those of each end."""
    item = tl.arange(0, ITEMS_PAD)
    exists = item < items
    length = tl.load(lengths_ptr + item // KV_HEADS, mask=exists, other=0)
    if RECENTS:
        recent = tl.load(recents_ptr + item // KV_HEADS, mask=exists, other=0)
    if SINCE:
        recent += tl.maximum(length - tl.load(since_ptr + item // KV_HEADS, mask=exists, other=0), 0)
    count = tl.minimum(tl.load(counts_ptr + item, mask=exists, other=0), capacity)
    first, start = key_bounds(length, recent, sinks)
    keys = tl.where(exists, first + tl.maximum(length, 0) - start + count, 0)
    return tl.cumsum((keys + BLOCK_N - 1) // BLOCK_N, 0)


@triton.jit
def listed_decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lists_ptr,
    counts_ptr,
    lengths_ptr,
    recents_ptr,
    since_ptr,
    table_ptr,
    partial_ptr,
    partial_lse_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    table_stride_b,
    capacity,
    items,
    programs,
    recent,
    sinks,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEMS_PAD: tl.constexpr,
    RECENTS: tl.constexpr,
    SINCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """An even share of the key tiles of all items, for ``BLOCK_M`` of the ``GROUP * ROWS`` rows that read each. Of each
    item that it crosses it writes a part: a normalised output, fp32 ``[places, GROUP * ROWS, D]``, and its log-sum-exp,
    ``[places, GROUP * ROWS]``, at the place ``program + item``, which no other part has, because of two that follow one
    another either the program or the item is another. Rows that saw nothing get zeros and -inf. Grid: row tiles
    fastest, which share their keys in L2, then programs.

    The keys of an item are the first tokens, the last ones, and those listed.
    """
    ROW_TILES: tl.constexpr = (GROUP * ROWS + BLOCK_M - 1) // BLOCK_M
    row_tile = tl.program_id(0) % ROW_TILES
    program = tl.program_id(0) // ROW_TILES
    ends = tile_ends(
        counts_ptr,
        lengths_ptr,
        recents_ptr,
        since_ptr,
        recent,
        sinks,
        capacity,
        items,
        KV_HEADS,
        RECENTS,
        SINCE,
        BLOCK_N,
        ITEMS_PAD,
    )
    all_tiles = tl.max(ends, 0)
    share = tl.cdiv(all_tiles, programs)
    tile = program * share
    last_tile = tl.minimum(tile + share, all_tiles)

    in_group = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = in_group < GROUP * ROWS
    row = in_group % ROWS
    dim = tl.arange(0, D_PAD)
    column = tl.arange(0, BLOCK_N)
    index = tl.arange(0, ITEMS_PAD)
    while tile < last_tile:
        item = tl.sum((ends <= tile).to(tl.int32), 0)
        item_start = tl.max(tl.where(index < item, ends, 0), 0)
        item_end = tl.sum(tl.where(index == item, ends, 0), 0)
        stop = tl.minimum(item_end, last_tile)
        batch = item // KV_HEADS
        kv_head = item % KV_HEADS
        length = tl.load(lengths_ptr + batch)
        own_recent = recent
        if RECENTS:
            own_recent = tl.load(recents_ptr + batch)
        if SINCE:
            own_recent += tl.maximum(length - tl.load(since_ptr + batch), 0)
        first, start = key_bounds(length, own_recent, sinks)
        always = first + length - start
        keys = always + tl.minimum(tl.load(counts_ptr + item), capacity)
        list_ptr = lists_ptr + item.to(tl.int64) * capacity
        own_table_ptr = table_ptr + batch.to(tl.int64) * table_stride_b
        own_key_ptr = key_ptr + kv_head.to(tl.int64) * key_stride_h
        own_value_ptr = value_ptr + kv_head.to(tl.int64) * value_stride_h

        # Before position 0 there is no key to see.
        position = tl.where(is_row, length - ROWS + row, -1)
        head = kv_head * GROUP + in_group // ROWS
        cells = batch.to(tl.int64) * query_stride_b + query_stride_h * head.to(tl.int64) + query_stride_n * row
        query = tl.load(query_ptr + cells[:, None] + dim[None, :], mask=is_row[:, None] & (dim < D)[None, :], other=0.0)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
        for i in tl.range(tile - item_start, stop - item_start):
            place = i * BLOCK_N + column
            is_listed = (place >= always) & (place < keys)
            key_position = tl.load(list_ptr + place - always, mask=is_listed, other=-1)
            key_position = tl.where(place < always, tl.where(place < first, place, place - first + start), key_position)
            is_key = (key_position >= 0) & (key_position < length)
            page = tl.load(own_table_ptr + key_position // PAGE, mask=is_key, other=-1)
            is_key = is_key & (page >= 0)
            in_page = (key_position % PAGE).to(tl.int64)
            key_start = page.to(tl.int64) * key_stride_b + in_page * key_stride_n
            value_start = page.to(tl.int64) * value_stride_b + in_page * value_stride_n
            key_mask = is_key[None, :]
            value_mask = is_key[:, None]
            if D != D_PAD:
                key_mask = key_mask & (dim < D)[:, None]
                value_mask = value_mask & (dim < D)[None, :]
            key = tl.load(own_key_ptr + key_start[None, :] + dim[:, None], mask=key_mask, other=0.0)
            value = tl.load(own_value_ptr + value_start[:, None] + dim[None, :], mask=value_mask, other=0.0)

            logits = tl.dot(query, key, input_precision=PRECISION)
            logits = softcap * LOG2E * tanh(logits * (scale / softcap)) if SOFTCAP else logits * (scale * LOG2E)
            visible = (key_position[None, :] <= position[:, None]) & is_key[None, :]
            logits = tl.where(visible, logits, float("-inf"))
            peak, total, acc = accumulate_gated(logits, 1.0, value, peak, total, acc, 1.0, "straight", PRECISION)

        part = (program + item).to(tl.int64) * (GROUP * ROWS) + in_group
        total = tl.where(total == 0, 1.0, total)
        out = acc / total[:, None]
        tl.store(partial_ptr + part[:, None] * D + dim[None, :], out, mask=is_row[:, None] & (dim < D)[None, :])
        tl.store(partial_lse_ptr + part, (peak + tl.log2(total)) / LOG2E, mask=is_row)
        tile = stop


@triton.jit
def merge_parts_kernel(
    partial_ptr,
    partial_lse_ptr,
    counts_ptr,
    lengths_ptr,
    recents_ptr,
    since_ptr,
    sink_logits_ptr,
    out_ptr,
    lse_ptr,
    capacity,
    items,
    programs,
    recent,
    sinks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEMS_PAD: tl.constexpr,
    RECENTS: tl.constexpr,
    SINCE: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Merge the parts of a row by their log-sum-exp, ``STEP`` at a time, with the row's sink. One program a row."""
    cell = tl.program_id(0)
    head = cell // ROWS % (KV_HEADS * GROUP)
    batch = cell // ROWS // (KV_HEADS * GROUP)
    item = batch * KV_HEADS + head // GROUP
    in_group = head % GROUP * ROWS + cell % ROWS
    ends = tile_ends(
        counts_ptr,
        lengths_ptr,
        recents_ptr,
        since_ptr,
        recent,
        sinks,
        capacity,
        items,
        KV_HEADS,
        RECENTS,
        SINCE,
        BLOCK_N,
        ITEMS_PAD,
    )
    index = tl.arange(0, ITEMS_PAD)
    start = tl.max(tl.where(index < item, ends, 0), 0)
    end = tl.sum(tl.where(index == item, ends, 0), 0)
    share = tl.maximum(tl.cdiv(tl.max(ends, 0), programs), 1)
    first = start // share + item
    # As many places as programs that had a tile of the item.
    last = tl.where(end > start, (end - 1) // share + item, first - 1)

    dim = tl.arange(0, D_PAD)
    every = tl.arange(0, STEP)
    peak = tl.full([], float("-inf"), tl.float32)
    if SINK_LOGITS:
        exists = tl.load(lengths_ptr + batch) - ROWS + cell % ROWS >= 0
        sink = tl.where(exists, tl.load(sink_logits_ptr + head).to(tl.float32), float("-inf"))
        peak = tl.maximum(peak, sink)
    for place in range(first, last + 1, STEP):
        part = (place + every).to(tl.int64) * (GROUP * ROWS) + in_group
        peak = tl.maximum(
            peak, tl.max(tl.load(partial_lse_ptr + part, mask=place + every <= last, other=float("-inf")), 0)
        )
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.full([], 0.0, tl.float32)
    if SINK_LOGITS:
        total = tl.exp2((sink - base) * LOG2E)
    acc = tl.zeros([D_PAD], tl.float32)
    for place in range(first, last + 1, STEP):
        is_part = place + every <= last
        part = (place + every).to(tl.int64) * (GROUP * ROWS) + in_group
        weight = tl.exp2((tl.load(partial_lse_ptr + part, mask=is_part, other=float("-inf")) - base) * LOG2E)
        is_cell = is_part[:, None] & (dim < D)[None, :]
        partial = tl.load(partial_ptr + part[:, None] * D + dim[None, :], mask=is_cell, other=0.0)
        acc += tl.sum(partial * weight[:, None], 0)
        total += tl.sum(weight, 0)
    total = tl.where(total == 0, 1.0, total)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + cell.to(tl.int64) * D + dim, out, mask=dim < D)
    tl.store(lse_ptr + cell, peak + tl.log2(total) / LOG2E)
