"""What lies beside the keys of a paged cache, and what is asked of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GRANULE = 16
"""Tokens that share bounds: positions ``16 g`` to ``16 g + 15``."""
BYTES = torch.float8_e4m3fn
"""Bounds of 8 bits."""


class KeyMirror(NamedTuple):
    """The keys of a paged cache in 4 bits a channel (2502.02770, section 4).

    A key is kept as ``(key - center) / spread``, whose channels are alike, and that as integers from 0 to 15: with
    ``step`` and ``low`` of a token and KV head, ``low + step * code`` stands for it. ``center`` and ``spread`` are a
    sequence's own and stay as they were when its first token came. Codes of tokens that are not there may be anything.
    All tensors are contiguous.
    """

    codes: Tensor
    """uint8 ``[pages, Hkv, page, D // 2]``: channel ``c`` in the low 4 bits of byte ``c``, ``D // 2 + c`` in the
    high ones."""
    scale_low: Tensor
    """fp16 ``[pages, Hkv, page, 2]``: ``step`` and ``low``."""
    center: Tensor
    """fp32 ``[B, Hkv, D]``."""
    spread: Tensor
    """fp32 ``[B, Hkv, D]``, positive."""

    def check(self, batch: int, device: torch.device) -> tuple[int, int, int, int]:
        """``(pages, Hkv, page, D)`` of the cache that this belongs to.

        Raises:
            TypeError: a tensor has the wrong dtype or device.
            ValueError: a tensor has the wrong shape or layout; the message names it.
        """
        if self.codes.dim() != 4 or self.codes.shape[3] == 0:
            raise ValueError(
                f"codes has shape {tuple(self.codes.shape)}, expected [pages, kv heads, page, head_dim / 2]"
            )
        pages, kv_heads, page, half = self.codes.shape
        moments = (batch, kv_heads, 2 * half)
        check_tensor("codes", self.codes, (pages, kv_heads, page, half), torch.uint8, device)
        check_tensor("scale_low", self.scale_low, (pages, kv_heads, page, 2), torch.float16, device)
        check_tensor("center", self.center, moments, torch.float32, device)
        check_tensor("spread", self.spread, moments, torch.float32, device)
        return pages, kv_heads, page, 2 * half


class PageBounds(NamedTuple):
    """The smallest and the largest value of every channel among 16 keys that follow one another (2406.10774,
    Algorithm 1). Those of the granule being filled are of its tokens so far. Taking tokens back leaves bounds that hold
    and may be wider than need be."""

    values: Tensor
    """``[pages, Hkv, page // 16, 2, D]``, contiguous: minima, then maxima. In the keys' dtype, or in 8 bits (``torch.
    float8_e4m3fn``), where they are of ``(key - center) / spread`` and rounded outwards; 448 is the largest."""
    center: Tensor | None = None
    """fp32 ``[B, Hkv, D]``, for 8 bits: the mirror's, or others that do not change either."""
    spread: Tensor | None = None

    def check(self, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int, int]:
        """``(pages, Hkv, page, D)`` of the cache that this belongs to, whose keys have ``dtype``.

        Raises:
            TypeError: a tensor is missing or superfluous, or has the wrong dtype or device.
            ValueError: a tensor has the wrong shape or layout; the message names it.
        """
        if self.values.dim() != 5 or self.values.shape[3] != 2:
            raise ValueError(
                f"bounds has shape {tuple(self.values.shape)}, expected [pages, kv heads, page / {GRANULE}, 2, dim]"
            )
        pages, kv_heads, granules, _, head_dim = self.values.shape
        if self.values.dtype not in (dtype, BYTES):
            raise TypeError(f"bounds is {self.values.dtype}, expected {dtype} as the keys are, or {BYTES}")
        check_tensor("bounds", self.values, self.values.shape, self.values.dtype, device)
        for name, tensor in (("center", self.center), ("spread", self.spread)):
            if (tensor is None) != (self.values.dtype != BYTES):
                raise TypeError(f"bounds of {self.values.dtype} {'have no' if tensor is not None else 'need a'} {name}")
            if tensor is not None:
                check_tensor(f"{name} of bounds", tensor, (batch, kv_heads, head_dim), torch.float32, device)
        return pages, kv_heads, granules * GRANULE, head_dim


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    strided: bool = False,
) -> None:
    """One tensor has this shape, dtype and device, and is contiguous unless ``strided``.

    Raises:
        TypeError: dtype or device are others.
        ValueError: the shape or the layout is another.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype != dtype or tensor.device != device:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} on {device}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: it is never copied; make it contiguous")
