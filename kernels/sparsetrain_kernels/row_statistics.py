"""What backward kernels read of each row, and how their launches ask for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.launching import cdiv, launch, pad_head_dim
from sparsetrain_kernels.online_softmax import LOG2E

ROWS = 64
"""Rows of one program."""


def row_statistics(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp in units of log2 and ``delta``, the sum of each row's ``grad_out * out`` less the gradient of its
    log-sum-exp; fp32 ``[B, Hq, N]``.

    Rows that saw nothing get an infinite log-sum-exp, which makes their weights zero.
    """
    batch, heads, rows, head_dim = out.shape
    # Two tensors, not halves of one, which TMA could not read at an address of any multiple of 4.
    in_log2, delta = (torch.empty((batch, heads, rows), dtype=torch.float32, device=out.device) for _ in range(2))
    tiles = cdiv(rows, ROWS)
    launch(
        row_statistics_kernel,
        tiles * heads * batch,
        (out, grad_out, lse, None if grad_lse is None else grad_lse.contiguous(), in_log2, delta),
        (*out.stride()[:3], *grad_out.stride()[:3], rows, tiles),
        HEADS=heads,
        D=head_dim,
        D_PAD=pad_head_dim(head_dim),
        BLOCK_M=ROWS,
        GRAD_LSE=grad_lse is not None,
    )
    return in_log2, delta


@triton.jit
def row_statistics_kernel(
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    grad_lse_ptr,
    in_log2_ptr,
    delta_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    rows,
    tiles,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """``BLOCK_M`` rows of one head."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % tiles
    batch = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    dim = tl.arange(0, D_PAD)
    mask = is_row[:, None] & (dim < D)[None, :]
    wide = row.to(tl.int64)
    out_ptr += batch * out_stride_b + head.to(tl.int64) * out_stride_h
    grad_out_ptr += batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    place = (batch * HEADS + head) * rows + row
    lse = tl.load(lse_ptr + place, mask=is_row, other=0.0)
    saw = lse > float("-inf")
    # What is no output has no gradient, NaN or not.
    mask = mask & saw[:, None]
    out = tl.load(out_ptr + wide[:, None] * out_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_out_ptr + wide[:, None] * grad_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + place, mask=is_row & saw, other=0.0)
    tl.store(in_log2_ptr + place, tl.where(saw, lse * LOG2E, float("inf")), mask=is_row)
    tl.store(delta_ptr + place, delta, mask=is_row)
