"""What every launch of a Triton kernel needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor


def pad_head_dim(head_dim: int) -> int:
    """The head dim the tiles have: a power of two of at least 64 (smaller ones are miscompiled on Hopper)."""
    return max(64, triton.next_power_of_2(head_dim))


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launch on the tensor's own device: autograd calls backward with whatever device is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
