"""Inputs of checkpointed layers wait in host memory: copied out while the next layer computes, fetched one layer ahead.

torch has :func:`torch.autograd.graph.save_on_cpu`, which transformers offers too; both copies run on the stream that
computes, so every layer waits for them. Here they run beside it.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes below which a tensor stays on the device: masks and counters are not worth a copy."""


class ActivationOffload(torch.autograd.graph.saved_tensors_hooks):
    """A context: what autograd saves inside it is kept in host memory until backward asks for it.

    Memory is bounded by the order of the streams, not by how far the host runs ahead: a tensor leaves the device when
    the next one is saved, and the computing stream then waits for the copy before the memory is used again. So two of
    them are on the device at a time, in the forward pass as in the backward pass.

    Backward passes must ask in the opposite order of saving, as those over layers do; anything else is correct but
    waits. On a device that is no GPU the copies are plain ones.

    Args:
        device: where the activations are.
        smallest: bytes below which a tensor stays there.
    """

    def __init__(self, device: torch.device, smallest: int = SMALLEST) -> None:
        super().__init__(self._save, self._fetch)
        self.device, self.smallest = device, smallest
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_flight: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.last: weakref.ref[_Saved] | None = None

    def _save(self, tensor: Tensor) -> Tensor | _Saved:
        if tensor.device != self.device or tensor.nbytes < self.smallest or isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._let_go()
        with self._beside():
            host = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
            host.copy_(tensor, non_blocking=True)
        # Held until the next one comes: by then the copy has had a layer's time.
        self.in_flight.append((tensor, self._mark()))
        saved = _Saved(host, self.last)
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
        # What is asked for next, while the layer of this one is recomputed.
        before = None if saved.before is None else saved.before()
        if before is not None and before.coming is None:
            before.coming = self._bring(before)
            # Held here too: its memory must not be used again under the copy should nobody ask for it.
            self.in_flight.append(before.coming)
        return tensor

    def _bring(self, saved: _Saved) -> tuple[Tensor, torch.cuda.Event | None]:
        # Allocated by the computing stream, which also frees it; the copy waits for whatever used the memory before.
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
        """The copying stream, behind what is queued on the computing one so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self.stream is None else self.stream.record_event()


class _Saved:
    """A tensor in host memory, and on its way back once backward is near."""

    def __init__(self, host: Tensor, before: weakref.ref[_Saved] | None) -> None:
        self.host = host
        # Weak: a forward pass whose graph is gone must not live on in the next one.
        self.before = before
        self.coming: tuple[Tensor, torch.cuda.Event | None] | None = None
