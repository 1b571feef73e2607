"""What every launch of a Triton kernel needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

_HERE = nullcontext()
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""By what Triton looks at: the compiled kernel, and the constants that end its arguments."""
MOST_COMPILED = 4096
"""Entries at which they are all dropped."""


class Config(NamedTuple):
    """How one kernel is compiled."""

    block_m: int
    """Query rows of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int


def pad_head_dim(head_dim: int) -> int:
    """The head dim the tiles have: a power of two of at least 64 (smaller ones are miscompiled on Hopper)."""
    return max(64, triton.next_power_of_2(head_dim))


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launch on the tensor's own device: autograd calls backward with whatever device is current."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else _HERE


def launch(kernel: Any, programs: int, tensors: Sequence[Any], numbers: tuple[float, ...], **constants: Any) -> None:
    """``kernel[(programs,)](*tensors, *numbers, **constants)``, for kernels whose arguments come in this order.

    Triton looks at every argument of every launch to find the kernel that was compiled for arguments like these, which
    takes longer than the launch. Where nothing that it looks at has changed, this hands the arguments to the compiled
    kernel at once: the same types, constants and kinds of numbers, and all addresses multiples of 16 bytes.

    Args:
        tensors: of one device; None, or a tensor descriptor of ``hopper/descriptors.py``, in place of some.
        constants: what the kernel takes as ``constexpr``, and options of the compiler.
    """
    pointers: list[Any] = []
    kinds: list[Any] = []
    addresses, device = 0, None
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            address = tensor.data_ptr()
            addresses |= address
            pointers.append(address)
            kinds.append(tensor.dtype)
            device = device or tensor.device
        else:
            pointers.append(tensor)
            kinds.append(tensor and tensor.kind)
    aligned = addresses % 16 == 0
    alike = _kinds(numbers, tuple(map(type, numbers)))
    key = (id(kernel), device, *kinds, alike, *constants, *constants.values())
    found = _COMPILED.get(key) if aligned else None
    if found is not None:
        compiled, values = found
        compiled[(programs, 1, 1)](*pointers, *numbers, *values)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, **constants)
    # The interpreter returns nothing.
    if compiled is not None and aligned:
        if len(_COMPILED) >= MOST_COMPILED:
            _COMPILED.clear()
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _COMPILED[key] = compiled, tuple(constants[name] for name in names)


@lru_cache(maxsize=MOST_COMPILED)
def _kinds(numbers: tuple[float, ...], types: tuple[type, ...]) -> tuple[object, ...]:
    """What a kernel is compiled for of its numbers: types (1 and 1.0 are equal), and whether one is 1 or a multiple of
    16."""
    return tuple(
        (number == 1, number % 16 == 0, abs(number) >= 2**31) if isinstance(number, int) else type(number)
        for number in numbers
    )
