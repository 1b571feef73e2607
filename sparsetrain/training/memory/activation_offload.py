"""Offload the inputs of checkpointed layers to host memory, asynchronously, and prefetch them one layer ahead.

:func:`torch.autograd.graph.save_on_cpu`, which transformers offers too, copies on the compute stream, so every layer
waits for the copies. Here they overlap with computation.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsetrain.training.memory.host_buffers import HostBuffers

SMALLEST = 1 << 20
"""Bytes below which a tensor stays on the device: masks and counters are not worth a copy."""


class ActivationOffload(torch.autograd.graph.saved_tensors_hooks):
    """A context in which tensors that autograd saves are kept in host memory until backward needs them.

    Memory is bounded by the order of the streams, not by how far the host runs ahead: a tensor leaves the device when
    the next one is saved, and the compute stream then waits for the copy before the memory is reused. So at most two of
    them are on the device at a time, in the forward and the backward pass.

    Prefetching assumes that backward reads tensors in reverse order, as it does over layers; any other order is correct
    but waits for copies. On a device other than a GPU the copies are synchronous.

    Args:
        device: The device of the activations.
        smallest: Size in bytes below which a tensor stays on the device.
    """

    def __init__(self, device: torch.device, smallest: int = SMALLEST) -> None:
        super().__init__(self._save, self._fetch)
        self.device, self.smallest = device, smallest
        self.buffers = HostBuffers(device)
        """Where tensors wait. All copies are on one stream, so that a buffer is read before it is used again."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_flight: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.last: weakref.ref[_Saved] | None = None

    def _save(self, tensor: Tensor) -> Tensor | _Saved:
        if tensor.device != self.device or tensor.nbytes < self.smallest or isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._let_go()
        host, buffer = self.buffers.take(tensor)
        with self._beside():
            host.copy_(tensor, non_blocking=True)
        # Kept until the next one is saved: the copy then had the time of one layer. Without its graph, which would keep
        # the buffers of a pass that has no backward pass.
        self.in_flight.append((tensor.detach(), self._mark()))
        saved = _Saved(host, self.last)
        weakref.finalize(saved, self.buffers.give_back, buffer).atexit = False
        self.last = weakref.ref(saved)
        return saved

    def _fetch(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._let_go()
        tensor, arrived = saved.coming or self._bring(saved)
        saved.coming = None
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        # Prefetch the next tensor while the layer of this one is recomputed.
        before = None if saved.before is None else saved.before()
        if before is not None and before.coming is None:
            before.coming = self._bring(before)
            # Keep a reference: its memory must not be reused during the copy, even if it is never fetched.
            self.in_flight.append(before.coming)
        return tensor

    def _bring(self, saved: _Saved) -> tuple[Tensor, torch.cuda.Event | None]:
        # Allocated and freed on the compute stream; the copy waits for earlier users of the memory.
        tensor = torch.empty_like(saved.host, device=self.device)
        with self._beside():
            tensor.copy_(saved.host, non_blocking=True)
        return tensor, self._mark()

    def _let_go(self) -> None:
        while self.in_flight:
            _, copied = self.in_flight.popleft()
            if copied is not None:
                torch.cuda.current_stream(self.device).wait_event(copied)

    def _beside(self) -> Any:
        """The copy stream, synchronised with the work queued on the compute stream so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self.stream is None else self.stream.record_event()


class _Saved:
    """A tensor in host memory, and its copy on the device once it is prefetched."""

    def __init__(self, host: Tensor, before: weakref.ref[_Saved] | None) -> None:
        self.host = host
        # A weak reference, so that a forward pass whose graph is freed is not kept alive by the next one.
        self.before = before
        self.coming: tuple[Tensor, torch.cuda.Event | None] | None = None
