"""Host memory in which activations wait: buffers that are made before the first step, counted, and used again.

Pages that a device copies from and to are pinned, which takes far longer than a copy. torch's pinned allocator would
pin each tensor on its way in the first step, and round its size up to a power of two. Here as many buffers as there are
layers are pinned ahead, by several threads, each of the size that is needed.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sparsetrain.errors import TrainingError

THREADS = 4
"""Threads of a rank that make buffers. It is mostly the kernel's work, and other ranks do the same."""


class HostBuffers:
    """Buffers of host memory, and which of them are free.

    What is read from a buffer before :meth:`give_back`, and what is written to it after the next :meth:`take`, must
    follow each other; the copies of one stream do.

    Args:
        device: The device of the tensors; for a GPU the buffers are pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0
        """Bytes of all buffers, free or not."""
        self._free: list[Tensor] = []

    def reserve(self, number: int, size: int, made: Callable[[int], None]) -> None:
        """Make buffers.

        Args:
            number: How many.
            size: Bytes of each.
            made: Called after each, with the bytes of all so far.

        Raises:
            TrainingError: The memory cannot be pinned.
        """
        with ThreadPoolExecutor(THREADS) as threads:
            for buffer in threads.map(self._make, [size] * number):
                self._free.append(buffer)
                self.nbytes += buffer.numel()
                made(self.nbytes)

    def take(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor with the shape, dtype and dense strides of another, and the buffer it lies in, uint8 ``[bytes]``.

        This is the smallest free one that is large enough, or a new one.
        """
        fitting = [index for index, buffer in enumerate(self._free) if buffer.numel() >= like.nbytes]
        if fitting:
            buffer = self._free.pop(min(fitting, key=lambda index: self._free[index].numel()))
        else:
            buffer = self._make(like.nbytes)
            self.nbytes += buffer.numel()
        dense = torch.empty_like(like, device="meta")
        return buffer[: like.nbytes].view(like.dtype).as_strided(dense.shape, dense.stride()), buffer

    def give_back(self, buffer: Tensor) -> None:
        """Let the next one take a buffer, uint8 ``[bytes]``."""
        self._free.append(buffer)

    def _make(self, size: int) -> Tensor:
        # Whole pages of its own: pages of two buffers cannot be pinned twice.
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self.device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, dtype=np.uint8)
        # Touched first: the kernel pins pages that are there faster.
        memory[:: mmap.PAGESIZE] = 0
        torch.cuda.set_device(self.device)  # of this thread
        address, runtime = memory.ctypes.data, torch.cuda.cudart()
        code = runtime.cudaHostRegister(address, size, 0)
        if int(code):
            raise TrainingError(
                f"train.offload_activations: {size / 2**30:,.2f} GiB of host memory cannot be pinned ({code}) beside "
                f"{self.nbytes / 2**30:,.2f} GiB; set it to false, or shorten the rows (sequence.length)"
            )
        # Before the memory is freed. At the end of the process the driver does so.
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
        return torch.from_numpy(memory)
