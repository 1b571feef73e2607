"""Rows that are not computed, which no other kernel writes: zeros, and a log-sum-exp of -inf."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.launching import cdiv, launch, pad_head_dim
from sparsetrain_kernels.listed_keys.inputs import ListedInputs

ROWS = 64
"""Rows of one program."""


def clear_skipped_rows(inputs: ListedInputs, rows: Tensor, lse: Tensor | None = None) -> None:
    """Write those of ``rows [B, Hq, N, D]`` and of ``lse``, fp32 ``[B, Hq, N]``, that their segments skip."""
    batch, heads, tokens, head_dim = rows.shape
    segments = inputs.cu_segments.shape[0] - 1
    launch(
        clear_skipped_rows_kernel,
        cdiv(tokens, ROWS) * batch,
        (rows, lse, inputs.cu_segments, inputs.skip),
        (*rows.stride()[:3], tokens, segments, segments.bit_length()),
        HEADS=heads,
        D=head_dim,
        D_PAD=pad_head_dim(head_dim),
        BLOCK_M=ROWS,
    )


@triton.jit(do_not_specialize=["steps"])
def clear_skipped_rows_kernel(
    rows_ptr,
    lse_ptr,
    cu_ptr,
    skip_ptr,
    rows_stride_b,
    rows_stride_h,
    rows_stride_n,
    tokens,
    segments,
    steps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``BLOCK_M`` rows of all heads. A search of ``steps`` halvings finds their segments. Grid: rows fastest, then the
    batch."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    is_row = row < tokens
    # How many segments begin at the row or before it: those that begin there and are empty too.
    low = tl.zeros([BLOCK_M], tl.int32)
    high = low + segments
    for _ in range(0, steps):
        middle = (low + high) // 2
        is_open = low < high
        begins = is_open & (tl.load(cu_ptr + middle, mask=is_open, other=0) <= row)
        low = tl.where(begins, middle + 1, low)
        high = tl.where(is_open & (begins == 0), middle, high)
    first = tl.load(cu_ptr + low - 1, mask=is_row, other=0) + tl.load(skip_ptr + low - 1, mask=is_row, other=0)
    is_skipped = is_row & (row < first)
    dim = tl.arange(0, D_PAD)
    mask = is_skipped[:, None] & (dim < D)[None, :]
    cells = rows_ptr + batch * rows_stride_b + (row.to(tl.int64) * rows_stride_n)[:, None] + dim[None, :]
    zeros = tl.zeros([BLOCK_M, D_PAD], rows_ptr.dtype.element_ty)
    for head in range(0, HEADS):
        tl.store(cells + tl.cast(head, tl.int64) * rows_stride_h, zeros, mask=mask)
        if lse_ptr is not None:
            place = (batch * HEADS + head) * tokens + row
            tl.store(lse_ptr + place, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_skipped)
