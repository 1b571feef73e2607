"""Scores of keys from their 4-bit codes: a program reads one split of the keys of a sequence and KV head, once for all
heads of the group; then the log-sum-exps of the splits are added."""

import triton
import triton.language as tl

from sparsetrain_kernels.key_mirror.triton.kernels import LARGEST
from sparsetrain_kernels.online_softmax import LOG2E, tanh

DIGIT: tl.constexpr = tl.constexpr(128)
"""A channel of the query is two signed digits to this base."""
LIMIT: tl.constexpr = tl.constexpr(127 * 128)
"""The largest integer of a query's channel."""
NOTHING: tl.constexpr = tl.constexpr(-1e38)
"""A peak below every score, of which differences can be taken."""


@triton.jit
def estimate_kernel(
    query_ptr,
    codes_ptr,
    scale_low_ptr,
    center_ptr,
    spread_ptr,
    lengths_ptr,
    table_ptr,
    lists_ptr,
    counts_ptr,
    due_ptr,
    scores_ptr,
    lse_ptr,
    query_stride_b,
    query_stride_h,
    table_stride_b,
    entries,
    columns,
    splits,
    max_length,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
    DUE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What falls to one split of a row of scores, ``[B, Hq, columns]`` in fp16, and the log-sum-exp of the split, ``[B,
    Hq, splits]``, for ``HEADS`` heads of a group. Grid: tiles of heads fastest, which share their keys in L2, then
    splits, KV heads, batch.

    A tile is ``BLOCK_N`` columns. Tiles with keys come first and are divided among the splits; so are those without.
    Digits of the query and codes are multiplied as integers: rows of the product are the high digits of the heads, then
    the low ones. A lane keeps the peak and the sum of its own columns, which meet after the last tile.
    ``LISTED`` is the number of tokens of a list's entry, 0 without lists. ``PACKED`` takes four codes apart at a time.
    """
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    head_tile = tl.program_id(0) % HEAD_TILES
    split = tl.program_id(0) // HEAD_TILES % splits
    kv_head = tl.program_id(0) // HEAD_TILES // splits % KV_HEADS
    batch = (tl.program_id(0) // HEAD_TILES // splits // KV_HEADS).to(tl.int64)
    if DUE:  # noqa: SIM102 (known when compiled)
        if tl.load(due_ptr + batch) == 0:
            return
    length = tl.maximum(tl.load(lengths_ptr + batch), 0)
    too_long = length > max_length
    length = tl.where(too_long, 0, length)
    used = length
    if LISTED:
        lists_ptr += (batch * KV_HEADS + kv_head) * entries
        count = tl.load(counts_ptr + batch * KV_HEADS + kv_head)
        count = tl.where(length > 0, tl.minimum(tl.maximum(count, 0), entries), 0)
        used = count * LISTED

    in_group = head_tile * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, HALF_PAD)
    head = kv_head * GROUP + in_group
    is_head = in_group < GROUP
    moments = (batch * KV_HEADS + kv_head) * (2 * HALF)
    query_ptr += batch * query_stride_b
    cells = (head * query_stride_h)[:, None] + channel[None, :]
    is_cell = is_head[:, None] & (channel < HALF)[None, :]
    left = tl.load(query_ptr + cells, mask=is_cell, other=0.0).to(tl.float32)
    right = tl.load(query_ptr + cells + HALF, mask=is_cell, other=0.0).to(tl.float32)
    offset = tl.zeros([HEADS], tl.float32)
    if SOFTCAP:
        center_left = tl.load(center_ptr + moments + channel, mask=channel < HALF, other=0.0)
        center_right = tl.load(center_ptr + moments + HALF + channel, mask=channel < HALF, other=0.0)
        offset = tl.sum(left * center_left[None, :] + right * center_right[None, :], 1) * scale
    spread_left = tl.load(spread_ptr + moments + channel, mask=channel < HALF, other=0.0)
    spread_right = tl.load(spread_ptr + moments + HALF + channel, mask=channel < HALF, other=0.0)
    left = left * spread_left[None, :]
    right = right * spread_right[None, :]
    # Not left - left: contracted with the product above, that is its rounding error.
    infinite = float("inf")
    wrong = tl.where((tl.abs(left) < infinite) & (tl.abs(right) < infinite), 0.0, float("nan"))
    wrong = tl.sum(wrong, 1)
    unit = tl.maximum(tl.max(tl.abs(left), 1), tl.max(tl.abs(right), 1)) / LIMIT
    unit = tl.where(unit > 0, unit, 1.0)
    left = tl.floor(tl.div_rn(left, tl.broadcast_to(unit[:, None], left.shape)) + 0.5).to(tl.int32)
    right = tl.floor(tl.div_rn(right, tl.broadcast_to(unit[:, None], right.shape)) + 0.5).to(tl.int32)
    total_query = (tl.sum(left, 1) + tl.sum(right, 1)).to(tl.float32)
    factor = scale * unit + wrong
    left = _digits(left, HEADS, HALF_PAD)
    right = _digits(right, HEADS, HALF_PAD)

    codes_ptr += kv_head.to(tl.int64) * (PAGE * HALF)
    scale_low_ptr += kv_head.to(tl.int64) * PAGE
    table_ptr += batch * table_stride_b
    row = batch * (KV_HEADS * GROUP) + head
    peak = tl.full([HEADS, BLOCK_N], NOTHING, tl.float32)
    total = tl.zeros([HEADS, BLOCK_N], tl.float32)
    column = tl.arange(0, BLOCK_N)
    place = tl.arange(0, 2)
    tiles = tl.cdiv(used, BLOCK_N)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES):
        at = tile * BLOCK_N + column
        if LISTED:
            entry = tl.load(lists_ptr + at // LISTED, mask=at < used, other=-1)
            position = tl.where(entry >= 0, entry * LISTED + at % LISTED, length)
        else:
            position = at
        is_key = position < length
        if LISTED or PAGE % BLOCK_N != 0:
            page = tl.load(table_ptr + position // PAGE, mask=is_key, other=-1)
        else:
            page = tl.load(table_ptr + tile * BLOCK_N // PAGE)
        is_key = tl.where(page >= 0, position, length) < length
        token = page.to(tl.int64) * (KV_HEADS * PAGE) + position % PAGE
        code_mask = is_key[None, :]
        if HALF != HALF_PAD:
            code_mask = code_mask & (channel < HALF)[:, None]
        codes = tl.load(codes_ptr + (token * HALF)[None, :] + channel[:, None], mask=code_mask, other=0)
        scale_low = tl.load(scale_low_ptr + token, mask=is_key, other=0)
        if PACKED:
            low = tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
            )
            high = tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F;}",
                "=r,r",
                [codes],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            low = (codes & 15).to(tl.int8)
            high = (codes >> 4).to(tl.int8)
        product = tl.dot(left, low, out_dtype=tl.int32)
        product = tl.dot(right, high, product, out_dtype=tl.int32)
        product = tl.reshape(product, [2, HEADS, BLOCK_N])
        product = tl.sum(product * tl.where(place == 0, DIGIT, 1)[:, None, None], 0)

        step = (scale_low & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        lowest = (scale_low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        score = product.to(tl.float32) * step[None, :] + total_query[:, None] * lowest[None, :]
        score = score * factor[:, None]
        if SOFTCAP:
            score = softcap * tanh((score + offset[:, None]) / softcap)
        score = tl.maximum(score, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
        score = tl.minimum(score, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        score = tl.where(is_key[None, :], score, float("-inf")).to(tl.float16)
        out = row[:, None] * columns + at[None, :]
        tl.store(scores_ptr + out, score, mask=is_head[:, None] & (at < columns)[None, :])

        score = score.to(tl.float32) * LOG2E
        larger = score > peak
        small = tl.exp2(-tl.abs(score - peak))
        total = tl.where(larger, total * small + 1.0, total + small)
        peak = tl.where(larger, score, peak)

    all_tiles = tl.cdiv(columns, BLOCK_N) - tiles
    nothing = tl.full([HEADS, BLOCK_N], float("-inf"), tl.float16)
    for tile in range(all_tiles * split // splits, all_tiles * (split + 1) // splits):
        at = (tiles + tile) * BLOCK_N + column
        out = row[:, None] * columns + at[None, :]
        tl.store(scores_ptr + out, nothing, mask=is_head[:, None] & (at < columns)[None, :])

    highest = tl.max(peak, 1)
    total = tl.sum(total * tl.exp2(peak - highest[:, None]), 1)
    wrong = tl.where(too_long, float("nan"), 0.0)
    highest = tl.where(total == 0, float("-inf"), highest)
    total = tl.where(total == 0, 1.0, total)
    lse = (highest + tl.log2(total)) / LOG2E + wrong
    tl.store(lse_ptr + row * splits + split, lse, mask=is_head)


@triton.jit
def _digits(integers, HEADS: tl.constexpr, HALF_PAD: tl.constexpr):
    """``[HEADS, HALF_PAD]`` integers as ``[2 * HEADS, HALF_PAD]`` digits, the high ones first."""
    high = (integers + DIGIT // 2) >> 7
    low = integers - high * DIGIT
    is_low = (tl.arange(0, 2) == 1)[:, None, None]
    digits = tl.where(is_low, low[None, :, :], high[None, :, :])
    return tl.reshape(digits, [2 * HEADS, HALF_PAD]).to(tl.int8)


@triton.jit
def add_splits_kernel(partial_ptr, due_ptr, lse_ptr, heads, splits, DUE: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """The log-sum-exp of a row from those of its splits. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    if DUE:  # noqa: SIM102 (known when compiled)
        if tl.load(due_ptr + row // heads) == 0:
            return
    split = tl.arange(0, SPLITS_PAD)
    part = tl.load(partial_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    # The maximum leaves out what is NaN, the sum does not.
    peak = tl.max(part, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2((part - base) * LOG2E), 0)
    total = tl.where(total == 0, 1.0, total)
    tl.store(lse_ptr + row, peak + tl.log2(total) / LOG2E)
