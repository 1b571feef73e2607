"""What the backward kernels read of each row and key: statistics padded to whole tiles, and counts of partial sums.

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
    exit_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    padded_threshold_ptr,
    parts_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    tokens,
    padded_tokens,
    tiles,
    window,
    HEADS: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """The log-sum-exp in units of log2, ``delta``, and the threshold, fp32 ``[B, heads, padded_tokens]``; and in how
    many stretches of rows each key is selected, int32 ``[B, SELECTIONS, tokens]``."""
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
        exit = tl.load(exit_ptr + selection * tokens + row, mask=is_row, other=0)
        parts = stretches_of(row + window, exit, STRETCH)
        tl.store(parts_ptr + selection * tokens + row, parts, mask=is_row)


@triton.jit
def stretches_of(enter, exit, STRETCH: tl.constexpr):
    """How many stretches the rows ``[enter, exit)`` meet."""
    return tl.where(exit > enter, (exit - 1) // STRETCH - enter // STRETCH + 1, 0)
