"""TMA descriptors of the tensors that the Hopper kernels read and add to."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LINE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32}


def tiles(tensor: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Of ``[B, H, N, D]``, for boxes of ``rows`` rows of one head, or of ``columns`` of their columns. Where TMA cannot
    read the tensor, of a copy."""
    return tiles_of(tensor, tile_fields(tensor.shape, tensor.stride(), tensor.dtype, rows, columns), rows, columns)


def tiles_of(tensor: Tensor, fields: dict[str, Any] | None, rows: int, columns: int | None = None) -> TensorDescriptor:
    """The same, with the ``tile_fields`` of tensors that are laid out like this one."""
    if fields is None or tensor.data_ptr() % 16:
        return tiles(tensor.clone(memory_format=torch.contiguous_format), rows, columns)
    return _descriptor(tensor, fields)


def line(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Of row statistics, for boxes of ``rows``."""
    return _descriptor(tensor, _line(tensor.numel(), rows))


@lru_cache(maxsize=1024)
def tile_fields(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int | None = None
) -> dict[str, Any] | None:
    """None where TMA cannot read the tensor: it wants 16-byte strides, and rows of consecutive elements."""
    if strides[3] != 1 or any(s <= 0 or s % 8 for n, s in zip(shape[:3], strides) if n > 1):
        return None
    block = [1, 1, rows, columns or shape[3]]
    # The stride of a dimension of one element is never used, but it has to be a legal one.
    legal = [s if n > 1 else 8 for n, s in zip(shape[:3], strides)]
    return _fields(dtype, list(shape), [*legal, 1], block, gl.NVMMASharedLayout.get_default_for(block, _TYPES[dtype]))


@lru_cache(maxsize=1024)
def _line(numbers: int, rows: int) -> dict[str, Any]:
    return _fields(torch.float32, [numbers], [1], [rows], LINE_LAYOUT)


def _fields(
    dtype: torch.dtype, shape: list[int], strides: list[int], block: list[int], layout: gl.NVMMASharedLayout
) -> dict[str, Any]:
    """Those of a descriptor, checked once: all but the tensor; and ``kind``, what decides how it is compiled."""
    descriptor = TensorDescriptor(torch.empty(0, dtype=dtype), shape, strides, block, layout)
    return vars(descriptor) | {"kind": (dtype, *block)}


def _descriptor(tensor: Tensor, fields: dict[str, Any]) -> TensorDescriptor:
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=tensor)
    return descriptor
