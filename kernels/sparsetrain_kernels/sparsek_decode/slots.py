"""What a layer keeps of each text: the slots of its keys and values, and what the threshold needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -1
"""Position of a slot that holds nothing."""


class SparseKSlots(NamedTuple):
    """The memory of one layer. Slots are, in this order: ``sinks`` first tokens, ``topk`` selected ones in any order,
    and the last ``window`` as a ring, where position ``p`` lies at ``p % window``. Sinks and selected tokens fill their
    slots from the first on, so that ``read`` tells which are empty. Every tensor is contiguous.

    ``Hs``, the number of selections, is that of KV heads, ``H``, or 1 that they share.
    """

    keys: Tensor
    """``[B, H, sinks + topk + window, D]``."""
    values: Tensor
    """``[B, H, sinks + topk + window, D]``."""
    positions: Tensor
    """int64 ``[B, Hs, sinks + topk + window]``, ``EMPTY`` where a slot holds nothing."""
    scores: Tensor
    """fp32 ``[B, Hs, sinks + topk + window]`` (fp64 for fp64 keys), -inf in empty slots."""
    buffer: Tensor
    """The largest scores that have competed, in any order, ``[B, Hs, C]``, -inf where there were fewer."""
    threshold: Tensor
    """That of ``buffer``, ``[B, Hs]``; -inf where no more than ``topk`` tokens have competed."""
    read: Tensor
    """Tokens read, int64 ``[B, Hs]``: the same for all heads of a text, each of which counts for itself."""

    def check(self, topk: int, window: int, sinks: int) -> None:
        """Raise where the tensors do not belong together.

        Raises:
            TypeError: one of them has the wrong dtype or device.
            ValueError: one of them has the wrong shape or layout; the message names it.
        """
        if self.keys.dim() != 4:
            raise ValueError(f"keys has shape {tuple(self.keys.shape)}, expected [batch, kv heads, slots, head_dim]")
        batch, heads, slots, _ = self.keys.shape
        if slots != sinks + topk + window:
            raise ValueError(
                f"keys has {slots} slots, expected {sinks} sinks + {topk} selected + {window} of the window"
            )
        selections = self.positions.shape[1] if self.positions.dim() == 3 else heads
        if selections not in (heads, 1):
            raise ValueError(f"positions has {selections} heads, expected the {heads} of keys, or 1 that they share")
        entries = self.buffer.shape[-1]
        if entries <= topk:
            raise ValueError(f"buffer has {entries} entries, expected more than topk={topk}")
        wide, each = torch.promote_types(self.keys.dtype, torch.float32), (batch, selections)
        for name, dtype, shape in (
            ("values", self.keys.dtype, self.keys.shape),
            ("positions", torch.int64, (*each, slots)),
            ("scores", wide, (*each, slots)),
            ("buffer", wide, (*each, entries)),
            ("threshold", wide, each),
            ("read", torch.int64, each),
        ):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
            if tensor.dtype != dtype or tensor.device != self.keys.device:
                raise TypeError(
                    f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} on {self.keys.device}, as keys are"
                )
        for name, tensor in zip(self._fields, self, strict=True):
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}: slots are never copied; make it contiguous")
