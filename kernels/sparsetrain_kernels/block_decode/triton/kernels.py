"""The decoding kernels: each program attends to one split of the listed keys, then the splits of a row are merged."""

import triton
import triton.language as tl

from sparsetrain_kernels.block_pattern.triton.geometry import key_block_at, key_list
from sparsetrain_kernels.online_softmax import LOG2E, accumulate_gated, tanh


@triton.jit
def decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    lengths_ptr,
    table_ptr,
    sink_logits_ptr,
    far_ptr,
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
    splits,
    max_length,
    token_window,
    window,
    sinks,
    period,
    far_stride_h,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    TOKEN_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A share of the key tiles of one sequence and KV head, for ``BLOCK_M`` of the ``GROUP * ROWS`` rows that read
    them. Writes a normalised output, ``[B, Hq, ROWS, splits, D]``, and its log-sum-exp, ``[B, Hq, ROWS, splits]``; rows
    that saw nothing get zeros and -inf. Grid: row tiles fastest, which share their keys in L2, then splits, KV heads,
    batch.

    Rows in two pattern blocks have two lists: the tiles of the first, then those of the second, each for its own rows.
    A contiguous cache is one whose pages are the sequences (``PAGE`` 0). The peak is kept in units of log2.
    """
    KEY_TILES: tl.constexpr = (BLOCK + BLOCK_N - 1) // BLOCK_N
    ROW_TILES: tl.constexpr = (GROUP * ROWS + BLOCK_M - 1) // BLOCK_M
    row_tile = tl.program_id(0) % ROW_TILES
    split = tl.program_id(0) // ROW_TILES % splits
    kv_head = tl.program_id(0) // ROW_TILES // splits % KV_HEADS
    batch = tl.program_id(0) // ROW_TILES // splits // KV_HEADS
    length = tl.maximum(tl.load(lengths_ptr + batch), 0)
    too_long = length > max_length
    length = tl.where(too_long, 0, length)

    in_group = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + in_group // ROWS
    row = in_group % ROWS
    is_row = in_group < GROUP * ROWS
    # Before position 0 there is no key to see.
    position = tl.where(is_row, length - ROWS + row, -1)
    dim = tl.arange(0, D_PAD)
    cells = query_stride_h * head.to(tl.int64) + query_stride_n * row
    query_ptr += batch.to(tl.int64) * query_stride_b
    query = tl.load(query_ptr + cells[:, None] + dim[None, :], mask=is_row[:, None] & (dim < D)[None, :], other=0.0)

    far_ptr += kv_head * far_stride_h
    first_block = tl.maximum(length - ROWS, 0) // BLOCK
    last_block = tl.maximum(length - 1, 0) // BLOCK
    far = first_block % period * FAR
    n_sink, n_far, near = key_list(far_ptr + far, first_block, window, sinks, FAR)
    tiles = _tiles(n_sink, n_far, near, first_block, length, BLOCK, BLOCK_N, KEY_TILES)
    total_tiles = tiles
    if ROWS > 1:
        far_2 = last_block % period * FAR
        n_sink_2, n_far_2, near_2 = key_list(far_ptr + far_2, last_block, window, sinks, FAR)
        tiles_2 = _tiles(n_sink_2, n_far_2, near_2, last_block, length, BLOCK, BLOCK_N, KEY_TILES)
        total_tiles += tl.where(last_block > first_block, tiles_2, 0)

    if SINK_LOGITS:
        # Counted once, in the first share.
        has_sink = tl.where(split == 0, position, -1) >= 0
        sink = tl.load(sink_logits_ptr + head, mask=has_sink, other=float("-inf")).to(tl.float32)
        peak = sink * LOG2E
        total = tl.where(has_sink, 1.0, 0.0)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    key_ptr += kv_head.to(tl.int64) * key_stride_h
    value_ptr += kv_head.to(tl.int64) * value_stride_h
    table_ptr += batch.to(tl.int64) * table_stride_b
    column = tl.arange(0, BLOCK_N)
    for i in tl.range(total_tiles * split // splits, total_tiles * (split + 1) // splits):
        index = i
        query_block = first_block
        if ROWS > 1:
            second = i >= tiles
            index = tl.where(second, i - tiles, i)
            query_block = tl.where(second, last_block, first_block)
            key_block = key_block_at(
                far_ptr + tl.where(second, far_2, far),
                index // KEY_TILES,
                query_block,
                tl.where(second, n_sink_2, n_sink),
                tl.where(second, n_far_2, n_far),
                tl.where(second, near_2, near),
            )
        else:
            key_block = key_block_at(far_ptr + far, index // KEY_TILES, query_block, n_sink, n_far, near)
        in_block = index % KEY_TILES * BLOCK_N + column
        key_position = key_block * BLOCK + in_block
        is_key = key_position < length
        if BLOCK % BLOCK_N != 0:
            is_key = is_key & (in_block < BLOCK)
        if PAGE == 0:
            page = batch.to(tl.int64)
            in_page = key_position
        elif PAGE % BLOCK_N == 0:
            page = tl.load(table_ptr + (key_block * BLOCK + index % KEY_TILES * BLOCK_N) // PAGE).to(tl.int64)
            in_page = key_position % PAGE
        else:
            page = tl.load(table_ptr + key_position // PAGE, mask=is_key, other=0).to(tl.int64)
            in_page = key_position % PAGE
        key_start = page * key_stride_b + in_page.to(tl.int64) * key_stride_n
        value_start = page * value_stride_b + in_page.to(tl.int64) * value_stride_n
        key_mask = is_key[None, :]
        value_mask = is_key[:, None]
        if D != D_PAD:
            key_mask = key_mask & (dim < D)[:, None]
            value_mask = value_mask & (dim < D)[None, :]
        key = tl.load(key_ptr + key_start[None, :] + dim[:, None], mask=key_mask, other=0.0)
        value = tl.load(value_ptr + value_start[:, None] + dim[None, :], mask=value_mask, other=0.0)

        logits = tl.dot(query, key, input_precision=PRECISION)
        logits = softcap * LOG2E * tanh(logits * (scale / softcap)) if SOFTCAP else logits * (scale * LOG2E)
        visible = (key_position[None, :] <= position[:, None]) & is_key[None, :]
        if TOKEN_WINDOW:
            visible = visible & (key_position[None, :] > position[:, None] - token_window)
        if ROWS > 1:
            visible = visible & (position // BLOCK == query_block)[:, None]
        logits = tl.where(visible, logits, float("-inf"))
        peak, total, acc = accumulate_gated(logits, 1.0, value, peak, total, acc, 1.0, "straight", PRECISION)

    wrong = tl.where(too_long, float("nan"), 0.0)
    place = ((batch.to(tl.int64) * KV_HEADS * GROUP + head) * ROWS + row) * splits + split
    total = tl.where(total == 0, 1.0, total)
    out = (acc / total[:, None] + wrong).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * D + dim[None, :], out, mask=is_row[:, None] & (dim < D)[None, :])
    tl.store(lse_ptr + place, (peak + tl.log2(total)) / LOG2E + wrong, mask=is_row)


@triton.jit
def _tiles(
    n_sink, n_far, near, query_block, length, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, KEY_TILES: tl.constexpr
):
    """Key tiles of a list: those of earlier blocks, and of the own block those with a key."""
    own = tl.minimum(length - query_block * BLOCK, BLOCK)
    return (n_sink + n_far + query_block - near) * KEY_TILES + tl.cdiv(own, BLOCK_N)


@triton.jit
def merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    splits,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    STEP: tl.constexpr,
):
    """Merge the shares of a row by their log-sum-exp, ``STEP`` at a time. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, D_PAD)
    partial_lse_ptr += row * splits
    partial_ptr += row * splits * D
    every = tl.arange(0, SPLITS_PAD)
    parts = tl.load(partial_lse_ptr + every, mask=every < splits, other=float("-inf"))
    peak = tl.max(parts, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2((parts - base) * LOG2E), 0)
    total = tl.where(total == 0, 1.0, total)
    acc = tl.zeros([D_PAD], tl.float32)
    for start in range(0, splits, STEP):
        split = start + tl.arange(0, STEP)
        is_split = split < splits
        part = tl.load(partial_lse_ptr + split, mask=is_split, other=float("-inf"))
        is_cell = is_split[:, None] & (dim < D)[None, :]
        partial = tl.load(partial_ptr + split[:, None] * D + dim[None, :], mask=is_cell, other=0.0)
        acc += tl.sum(partial * tl.exp2((part - base) * LOG2E)[:, None], 0)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + dim, out, mask=dim < D)
    tl.store(lse_ptr + row, peak + tl.log2(total) / LOG2E)
