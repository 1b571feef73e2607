"""What every launch of a Triton kernel needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.backend import TESTED_GLUON, TRITON_VERSION

_HERE = nullcontext()
_DIRECT = TESTED_GLUON[0] <= TRITON_VERSION <= TESTED_GLUON[1]
"""Whether this Triton's compiled kernels are known to be launched by ``run``, which saves what is done for hooks."""
_ROCM = torch.version.hip is not None
_PREPARED: dict[tuple[Any, ...], Launch] = {}
"""By what Triton looks at."""
MOST_PREPARED = 4096
"""Entries at which they are all dropped."""


class Config(NamedTuple):
    """How one kernel is compiled."""

    block_m: int
    """Query rows of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own function of this name, and of the next, takes as long as an allocation."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def pad_head_dim(head_dim: int) -> int:
    """The head dim the tiles have: a power of two of at least 64 (smaller ones are miscompiled on Hopper)."""
    return max(64, next_power_of_2(head_dim))


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launch on the tensor's own device: autograd calls backward with whatever device is current."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else _HERE


def launch(kernel: Any, programs: int, tensors: Sequence[Any], numbers: tuple[float, ...], **constants: Any) -> None:
    """``kernel[(programs,)](*tensors, *numbers, **constants)``, for kernels whose arguments come in this order.

    Args:
        tensors: of one device, the current one; None, or a tensor descriptor of ``hopper/descriptors.py``, in place of
            some.
        constants: what the kernel takes as ``constexpr``, and options of the compiler.
    """
    prepare(kernel, tensors, numbers, **constants)(programs, tensors, numbers)


def prepare(kernel: Any, tensors: Sequence[Any], numbers: tuple[float, ...], **constants: Any) -> Launch:
    """What launches the kernel with arguments like these; they are those of :func:`launch`."""
    kinds: list[Any] = []
    device: Any = None
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            # For AMD, kernels are compiled with 32-bit offsets if the storage has less than 2 GiB.
            kinds.append((tensor.dtype, tensor.untyped_storage().nbytes() < 2**31) if _ROCM else tensor.dtype)
            device = device or tensor.device
        else:
            kinds.append(tensor and tensor.kind)
    alike = _kinds(numbers, tuple(map(type, numbers)))
    key = (id(kernel), device, *kinds, alike, *constants, *constants.values())
    if (found := _PREPARED.get(key)) is None:
        if len(_PREPARED) >= MOST_PREPARED:
            _PREPARED.clear()
        found = _PREPARED[key] = Launch(kernel, device, constants)
    return found


class Launch:
    """A kernel's launch with arguments of some kinds: types, constants, numbers that are 1 or multiples of 16, or not.

    Triton looks at every argument of every launch to find the kernel that was compiled for arguments like these, which
    takes longer than the launch. This hands them to the compiled kernel at once, where all addresses are multiples of
    16 bytes.
    """

    def __init__(self, kernel: Any, device: torch.device, constants: dict[str, Any]) -> None:
        self._kernel, self._device, self._constants = kernel, device, constants
        self._compiled: Any = None
        self._values: tuple[Any, ...] = ()

    def __call__(self, programs: int, tensors: Sequence[Any], numbers: tuple[float, ...]) -> None:
        """Launch it; the arguments are those of :func:`launch`."""
        pointers: list[Any] = []
        addresses = 0
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                tensor = tensor.data_ptr()
                addresses |= tensor
            pointers.append(tensor)
        compiled = self._compiled
        if compiled is None or addresses % 16:
            compiled = self._kernel[(programs,)](*tensors, *numbers, **self._constants)
            # The interpreter returns nothing.
            if compiled is not None and not addresses % 16:
                names = self._kernel.arg_names[len(tensors) + len(numbers) :]
                self._compiled, self._values = compiled, tuple(self._constants[name] for name in names)
        elif _DIRECT and not _hooks_wait():
            own = (compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(programs, 1, 1, stream_of(self._device), *own, *pointers, *numbers, *self._values)
        else:
            compiled[(programs, 1, 1)](*pointers, *numbers, *self._values)


def stream_of(device: torch.device) -> int:
    """The current one. Cached tensors are read on the stream that wrote them, which orders the two."""
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


def _hooks_wait() -> bool:
    """Whether a profiler, say, wants to be told of launches: by a chain that is not empty, or by itself."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


@lru_cache(maxsize=MOST_PREPARED)
def _kinds(numbers: tuple[float, ...], types: tuple[type, ...]) -> tuple[object, ...]:
    """What a kernel is compiled for of its numbers: types (1, 1.0 and True are equal), bits of integers, and whether
    one is 1 or a multiple of 16."""
    return tuple(
        (kind, number == 1, number % 16 == 0, -(2**31) <= number < 2**31, number >= 2**63)
        if isinstance(number, int)
        else kind
        for number, kind in zip(numbers, types, strict=True)
    )
