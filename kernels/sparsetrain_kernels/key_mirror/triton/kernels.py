"""The kernel that takes tokens into a cache: a program a KV head and 16 consecutive positions, or one."""

import triton
import triton.language as tl

GRANULE: tl.constexpr = tl.constexpr(16)
"""Tokens that share bounds."""
LARGEST: tl.constexpr = tl.constexpr(65504.0)
"""The largest number in fp16."""


@triton.jit
def append_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    lengths_ptr,
    table_ptr,
    codes_ptr,
    scale_low_ptr,
    center_ptr,
    spread_ptr,
    bounds_ptr,
    bounds_center_ptr,
    bounds_spread_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    key_cache_stride_b,
    key_cache_stride_h,
    key_cache_stride_n,
    value_cache_stride_b,
    value_cache_stride_h,
    value_cache_stride_n,
    table_stride_b,
    max_pages,
    new,
    tiles,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    CACHE: tl.constexpr,
    MIRROR: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """``TILE`` positions, 1 or 16 that share bounds, of one sequence and KV head. ``BOUNDS`` is ``"none"``, ``"keys"``
    (in their dtype) or ``"bytes"``. Grid: tiles fastest, KV heads, batch. The halves of a key are apart, as in a byte
    of codes. Without cache, mirror or bounds their pointers are not read.
    """
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % KV_HEADS).to(tl.int64)
    batch = (tl.program_id(0) // tiles // KV_HEADS).to(tl.int64)
    length = tl.load(lengths_ptr + batch)
    first = tl.maximum(length - new, 0)
    start = (first // TILE + tile) * TILE
    position = start + tl.arange(0, TILE)
    is_row = (position >= first) & (position < length) & (position // PAGE < max_pages)
    table_ptr += batch * table_stride_b
    page = tl.load(table_ptr + position // PAGE, mask=is_row, other=-1).to(tl.int64)
    is_row = is_row & (page >= 0)
    slot = (position % PAGE).to(tl.int64)
    row = (position - (length - new)).to(tl.int64)
    channel = tl.arange(0, HALF_PAD)
    is_channel = channel < HALF
    is_cell = is_row[:, None] & is_channel[None, :]

    key_cells = key_ptr + batch * key_stride_b + head * key_stride_h + (row * key_stride_n)[:, None] + channel[None, :]
    left = tl.load(key_cells, mask=is_cell, other=0.0)
    right = tl.load(key_cells + HALF, mask=is_cell, other=0.0)
    if CACHE:
        value_cells = value_ptr + batch * value_stride_b + head * value_stride_h
        value_cells = value_cells + (row * value_stride_n)[:, None] + channel[None, :]
        value_left = tl.load(value_cells, mask=is_cell, other=0.0)
        value_right = tl.load(value_cells + HALF, mask=is_cell, other=0.0)
        to_key = page * key_cache_stride_b + head * key_cache_stride_h + slot * key_cache_stride_n
        to_key = key_cache_ptr + to_key[:, None] + channel[None, :]
        tl.store(to_key, left, mask=is_cell)
        tl.store(to_key + HALF, right, mask=is_cell)
        to_value = page * value_cache_stride_b + head * value_cache_stride_h + slot * value_cache_stride_n
        to_value = value_cache_ptr + to_value[:, None] + channel[None, :]
        tl.store(to_value, value_left, mask=is_cell)
        tl.store(to_value + HALF, value_right, mask=is_cell)

    left = left.to(tl.float32)
    right = right.to(tl.float32)
    moments = (batch * KV_HEADS + head) * (2 * HALF) + channel
    if MIRROR:
        token = (page * KV_HEADS + head) * PAGE + slot
        scaled_left = _scale(left, center_ptr + moments, spread_ptr + moments, is_channel)
        scaled_right = _scale(right, center_ptr + moments + HALF, spread_ptr + moments + HALF, is_channel)
        wrong = tl.sum((scaled_left - scaled_left) + (scaled_right - scaled_right), 1)
        scaled_left = tl.minimum(tl.maximum(scaled_left, -LARGEST), LARGEST)
        scaled_right = tl.minimum(tl.maximum(scaled_right, -LARGEST), LARGEST)
        low = tl.min(tl.where(is_channel[None, :], tl.minimum(scaled_left, scaled_right), LARGEST), 1)
        high = tl.max(tl.where(is_channel[None, :], tl.maximum(scaled_left, scaled_right), -LARGEST), 1)
        step = ((high - low) * (1 / 15) + wrong).to(tl.float16)
        low = low.to(tl.float16)
        codes = _code(scaled_left, step, low) | (_code(scaled_right, step, low) << 4)
        tl.store(codes_ptr + (token * HALF)[:, None] + channel[None, :], codes.to(tl.uint8), mask=is_cell)
        tl.store(scale_low_ptr + token * 2, step, mask=is_row)
        tl.store(scale_low_ptr + token * 2 + 1, low, mask=is_row)

    if BOUNDS != "none":
        begin = start // GRANULE * GRANULE
        # Of the page that all positions share, or none.
        page = tl.max(tl.where(is_row, page, -1), 0)
        is_kept = tl.where(is_channel, page, -1) >= 0
        is_old = is_kept & (tl.where(is_channel, begin, first) < first)
        if BOUNDS == "bytes":
            left = _scale(left, bounds_center_ptr + moments, bounds_spread_ptr + moments, is_channel)
            right = _scale(right, bounds_center_ptr + moments + HALF, bounds_spread_ptr + moments + HALF, is_channel)
        granule = (page * KV_HEADS + head) * (PAGE // GRANULE) + begin % PAGE // GRANULE
        bounds_ptr += granule * (4 * HALF) + channel
        _extend(bounds_ptr, left, is_row, is_kept, is_old, False, BOUNDS)
        _extend(bounds_ptr + HALF, right, is_row, is_kept, is_old, False, BOUNDS)
        _extend(bounds_ptr + 2 * HALF, left, is_row, is_kept, is_old, True, BOUNDS)
        _extend(bounds_ptr + 3 * HALF, right, is_row, is_kept, is_old, True, BOUNDS)


@triton.jit
def _scale(key, center_ptr, spread_ptr, is_channel):
    """A key less its center and divided by its spread."""
    center = tl.load(center_ptr, mask=is_channel, other=0.0)
    spread = tl.load(spread_ptr, mask=is_channel, other=1.0)
    key = key - center[None, :]
    return tl.div_rn(key, tl.broadcast_to(spread[None, :], key.shape))


@triton.jit
def _code(scaled, step, low):
    """The integer from 0 to 15 that stands for each channel."""
    step = step.to(tl.float32)
    # What is no number has no code either; its step says so.
    step = tl.where(step > 0, step, 1.0)
    code = tl.floor(tl.div_rn(scaled - low.to(tl.float32)[:, None], tl.broadcast_to(step[:, None], scaled.shape)) + 0.5)
    return tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)


@triton.jit
def _extend(bounds_ptr, key, is_row, is_kept, is_old, UP: tl.constexpr, BOUNDS: tl.constexpr):
    """Take rows into the maxima, with ``UP``, or the minima of their granule, which had some before if ``is_old``."""
    if UP:
        extreme = tl.max(tl.where(is_row[:, None], key, float("-inf")), 0)
    else:
        extreme = tl.min(tl.where(is_row[:, None], key, float("inf")), 0)
    old = tl.load(bounds_ptr, mask=is_old, other=0)
    if BOUNDS == "bytes":
        byte = _round_outwards(extreme, UP)
        new = from_byte(byte)
        before = from_byte(old.to(tl.int32))
        stays = is_old & ((before >= new) if UP else (before <= new))
        tl.store(bounds_ptr, tl.where(stays, old.to(tl.int32), byte).to(tl.uint8), mask=is_kept)
    else:
        before = old.to(tl.float32)
        both = tl.maximum(before, extreme) if UP else tl.minimum(before, extreme)
        tl.store(bounds_ptr, tl.where(is_old, both, extreme).to(bounds_ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def _round_outwards(scaled, UP: tl.constexpr):
    """fp32 to the 8 bits of float8_e4m3fn, up or down: 4 bits of exponent and 3 behind the point. Below 2^-6 only 0."""
    size = tl.abs(scaled)
    away = (scaled > 0) if UP else (scaled <= 0)
    bits = ((size.to(tl.int32, bitcast=True) + tl.where(away, 0xFFFFF, 0)) >> 20) - (127 - 7) * 8
    bits = tl.where(size < 2.0**-6, tl.where(away & (size > 0), 8, 0), tl.minimum(bits, 0x7E))
    return tl.where(scaled < 0, bits | 0x80, bits)


@triton.jit
def from_byte(byte):
    """The numbers that bytes of float8_e4m3fn stand for, by 2^-8, in fp16: those that are none do not occur."""
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)
