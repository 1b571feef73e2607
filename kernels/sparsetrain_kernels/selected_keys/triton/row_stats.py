"""What the backward kernels read of each row and key: statistics padded to whole tiles, and places of partial sums.

Rows that do not exist have an infinite log-sum-exp, which makes their weights zero.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.online_softmax import LOG2E


@triton.jit
def selected_bwd_stats_kernel(
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    threshold_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    padded_threshold_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    tokens,
    padded_tokens,
    tiles,
    HEADS: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The log-sum-exp in units of log2, ``delta``, and the threshold, fp32 ``[B, heads, padded_tokens]``."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % tiles
    batch = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < tokens
    dim = tl.arange(0, D_PAD)
    mask = is_row[:, None] & (dim < D)[None, :]
    out_ptr += batch * out_stride_b + head.to(tl.int64) * out_stride_h
    grad_out_ptr += batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    wide_row = row.to(tl.int64)
    out = tl.load(out_ptr + wide_row[:, None] * out_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_out_ptr + wide_row[:, None] * grad_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    pair = batch * HEADS + head
    lse = tl.load(lse_ptr + pair * tokens + row, mask=is_row, other=float("inf"))
    tl.store(padded_lse_ptr + pair * padded_tokens + row, lse * LOG2E)
    tl.store(padded_delta_ptr + pair * padded_tokens + row, tl.sum(out * grad, 1))
    if head < SELECTIONS:
        selection = batch * SELECTIONS + head
        threshold = tl.load(threshold_ptr + selection * tokens + row, mask=is_row, other=0.0)
        tl.store(padded_threshold_ptr + selection * padded_tokens + row, threshold)


@triton.jit
def selected_bwd_places_kernel(exit_ptr, places_until_ptr, tokens, window, STRETCH: tl.constexpr, BLOCK: tl.constexpr):
    """Of each key, how many partial sums there are up to its last: as many for a key as stretches of rows that read it.
    int32 ``[B, SELECTIONS, tokens]``. Grid: the selections, each by itself, since sums of few long rows are slow in
    PyTorch."""
    exit_ptr += tl.program_id(0).to(tl.int64) * tokens
    places_until_ptr += tl.program_id(0).to(tl.int64) * tokens
    until = 0
    for start in range(0, tokens, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exit = tl.load(exit_ptr + key, mask=key < tokens, other=0)
        parts = stretches_of(key + window, exit, STRETCH)
        tl.store(places_until_ptr + key, until + tl.cumsum(parts, 0), mask=key < tokens)
        until += tl.sum(parts)


@triton.jit
def stretches_of(enter, exit, STRETCH: tl.constexpr):
    """How many stretches the rows ``[enter, exit)`` meet."""
    return tl.where(exit > enter, (exit - 1) // STRETCH - enter // STRETCH + 1, 0)
