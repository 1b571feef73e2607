"""TMA descriptors of the tensors that the Hopper kernels read and add to."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LINE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32}


def tiles(tensor: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Of ``[B, H, N, D]``, for boxes of ``rows`` rows of one head, or of ``columns`` of their columns."""
    tensor = tensor if _readable(tensor) else tensor.contiguous()
    block = [1, 1, rows, columns or tensor.shape[3]]
    # The stride of a dimension of one element is never used, but it has to be a legal one.
    strides = [s if n > 1 else 8 for n, s in zip(tensor.shape[:3], tensor.stride())]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block, _layout(*block[2:], tensor.dtype))


@lru_cache(maxsize=16)
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _TYPES[dtype])


def _readable(tensor: Tensor) -> bool:
    """TMA wants 16-byte addresses and strides, and rows of consecutive elements."""
    strides = [s for n, s in zip(tensor.shape[:3], tensor.stride()) if n > 1]
    return tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)


def line(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Of row statistics, for boxes of ``rows``."""
    return TensorDescriptor(tensor, [tensor.numel()], [1], [rows], LINE_LAYOUT)
