"""Upper bounds of logits from the bounds of 16 keys each: a program a tile of them, for all heads of a group."""

import triton
import triton.language as tl

from sparsetrain_kernels.key_mirror.triton.kernels import GRANULE, LARGEST, from_byte


@triton.jit
def page_scores_kernel(
    query_ptr,
    bounds_ptr,
    center_ptr,
    spread_ptr,
    lengths_ptr,
    table_ptr,
    due_ptr,
    scores_ptr,
    query_stride_b,
    query_stride_h,
    table_stride_b,
    granules,
    tiles,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BYTES: tl.constexpr,
    DUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_G`` scores of ``[B, Hkv, granules]``. Grid: tiles of granules fastest, KV heads, batch.

    The larger of ``q * min`` and ``q * max`` is the positive part of ``q`` times the maximum or the negative part times
    the minimum: two products of matrices. For bounds of 8 bits the query times the spread is two numbers of fp16 that
    add up to it, whose rows are the heads twice. ``HEADS`` heads of the group are taken at a time.
    """
    ROWS: tl.constexpr = 2 * HEADS if BYTES else HEADS
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles % KV_HEADS).to(tl.int64)
    batch = (tl.program_id(0) // tiles // KV_HEADS).to(tl.int64)
    if DUE:  # noqa: SIM102 (known when compiled)
        if tl.load(due_ptr + batch) == 0:
            return
    length = tl.load(lengths_ptr + batch)
    granule = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    in_row = (granule < granules) & (granule * GRANULE < length)
    position = granule * GRANULE
    page = tl.load(table_ptr + batch * table_stride_b + position // PAGE, mask=in_row, other=-1).to(tl.int64)
    is_kept = in_row & (page >= 0)
    place = (page * KV_HEADS + kv_head) * (PAGE // GRANULE) + position % PAGE // GRANULE
    channel = tl.arange(0, D_PAD)
    cells = bounds_ptr + (place * (2 * D))[None, :] + channel[:, None]
    is_cell = is_kept[None, :] & (channel < D)[:, None]
    lowest = tl.load(cells, mask=is_cell, other=0)
    highest = tl.load(cells + D, mask=is_cell, other=0)

    if BYTES:
        moments = (batch * KV_HEADS + kv_head) * D + channel
        center = tl.load(center_ptr + moments, mask=channel < D, other=0.0)
        spread = tl.load(spread_ptr + moments, mask=channel < D, other=0.0)
        lowest = from_byte(lowest.to(tl.int32))
        highest = from_byte(highest.to(tl.int32))

    row = tl.arange(0, ROWS)
    zero = tl.zeros([ROWS, D_PAD], tl.float16 if BYTES else query_ptr.dtype.element_ty)
    query_ptr += batch * query_stride_b + kv_head * GROUP * query_stride_h
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for first in tl.static_range(0, GROUP, HEADS):
        head = first + row % HEADS
        is_query = (head < GROUP)[:, None] & (channel < D)[None, :]
        query = tl.load(query_ptr + (head * query_stride_h)[:, None] + channel[None, :], mask=is_query, other=0.0)
        is_positive = query > 0
        if BYTES:
            query = query.to(tl.float32)
            offset = tl.sum(query * center[None, :], 1)
            query = query * spread[None, :]
            unit = tl.max(tl.abs(query), 1)
            unit = tl.where(unit > 0, unit, 1.0)
            query = query / unit[:, None]
            high = query.to(tl.float16).to(tl.float32)
            query = tl.where((row < HEADS)[:, None], high, query - high).to(tl.float16)
        score = tl.dot(tl.where(is_positive, query, zero), highest, input_precision=PRECISION)
        score = tl.dot(tl.where(is_positive, zero, query), lowest, score, input_precision=PRECISION)
        if BYTES:
            # Bytes stand for 2^8 times what they are taken for.
            score = score * (unit * 256.0)[:, None]
            score = tl.sum(tl.reshape(score, [2, HEADS, BLOCK_G]), 0)
            score = score + tl.max(tl.reshape(offset, [2, HEADS]), 0)[:, None]
        is_head = first + tl.arange(0, HEADS) < GROUP
        best = tl.maximum(best, tl.max(tl.where(is_head[:, None], score, float("-inf")), 0))
    out = scores_ptr + (batch * KV_HEADS + kv_head) * granules + granule
    best = tl.maximum(best * scale, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    best = tl.minimum(best, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out, tl.where(is_kept, best, float("-inf")).to(scores_ptr.dtype.element_ty), mask=granule < granules)
