"""Logarithms of exact weights: a program a tile of keys, for all heads of a group."""

import triton
import triton.language as tl

LEAST: tl.constexpr = tl.constexpr(-65504.0)


@triton.jit
def key_weights_kernel(
    query_ptr,
    keys_ptr,
    lse_ptr,
    lengths_ptr,
    table_ptr,
    due_ptr,
    weights_ptr,
    query_stride_b,
    query_stride_h,
    table_stride_b,
    page_stride,
    head_stride,
    key_stride,
    columns,
    tiles,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DUE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_N`` columns of ``[B, Hq, columns]``, fp16. Grid: tiles of columns fastest, KV heads, batch. Tiles without
    keys are not written."""
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles % KV_HEADS).to(tl.int64)
    batch = (tl.program_id(0) // tiles // KV_HEADS).to(tl.int64)
    if DUE:  # noqa: SIM102 (known when compiled)
        if tl.load(due_ptr + batch) == 0:
            return
    length = tl.minimum(tl.load(lengths_ptr + batch), columns)
    if tile * BLOCK_N >= length:
        return
    position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = position < length
    page = tl.load(table_ptr + batch * table_stride_b + position // PAGE, mask=is_key, other=-1).to(tl.int64)
    is_key = is_key & (page >= 0)
    channel = tl.arange(0, D_PAD)
    place = page * page_stride + kv_head * head_stride + (position % PAGE) * key_stride
    key = tl.load(
        keys_ptr + place[None, :] + channel[:, None], mask=is_key[None, :] & (channel < D)[:, None], other=0.0
    )
    query_ptr += batch * query_stride_b + kv_head * GROUP * query_stride_h
    row = (batch * KV_HEADS + kv_head) * GROUP
    for first in tl.static_range(0, GROUP, HEADS):
        head = first + tl.arange(0, HEADS)
        is_head = head < GROUP
        is_query = is_head[:, None] & (channel < D)[None, :]
        query = tl.load(query_ptr + (head * query_stride_h)[:, None] + channel[None, :], mask=is_query, other=0.0)
        logit = tl.dot(query, key, input_precision=PRECISION) * scale
        if SOFTCAP:
            # tanh, by an exponential that does not overflow.
            small = tl.exp(-2.0 * tl.abs(logit / softcap))
            bent = (1.0 - small) / (1.0 + small)
            logit = softcap * tl.where(logit < 0, -bent, bent)
        lse = tl.load(lse_ptr + row + head, mask=is_head, other=0.0)
        weight = tl.maximum(logit - lse[:, None], LEAST, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.where(is_key[None, :], weight, float("-inf")).to(tl.float16)
        out = weights_ptr + (row + head)[:, None] * columns + position[None, :]
        tl.store(out, weight, mask=is_head[:, None] & (position < columns)[None, :])
