"""Time and memory of one callable, and its failures as one line of text."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

MIB = 2**20
LONG_MS = 100.0
"""Calls longer than this are repeated a few times only; what the caches hold makes no difference to them."""
REPEATS = 3

T = TypeVar("T")


class Unavailable(Exception):
    """An implementation cannot run here. The message is the whole reason."""


def median_ms(
    call: Callable[[], object], *, device: torch.device, budget_ms: float, gradients: Sequence[Tensor] = ()
) -> float:
    """Median time of ``call`` in ms. The first call, which may compile, is not counted.

    On CUDA ``triton.testing.do_bench`` repeats a short call: it warms up, and empties the L2 cache before each.

    Args:
        budget_ms: time to repeat the call for, in ms.
        gradients: leaves whose ``.grad`` is dropped before every repetition, so that none adds up.
    """
    _elapsed_ms(call, device, gradients)
    first = _elapsed_ms(call, device, gradients)
    if device.type == "cuda" and first < LONG_MS:
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=budget_ms, grad_to_none=gradients or None, return_mode="median")
    repeats = max(REPEATS, min(100, int(budget_ms / max(first, 1e-3))))
    return median([first, *(_elapsed_ms(call, device, gradients) for _ in range(repeats - 1))])


def peak(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """The result of ``call``, and the bytes allocated at its peak beyond those before; None where nothing counts."""
    if device.type != "cuda":
        return call(), None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def extra_bytes(step: Callable[[], Tensor], inputs: Sequence[Tensor], device: torch.device) -> int | None:
    """Peak memory of a forward and backward pass beyond inputs, output and gradients; None where nothing counts it.

    Args:
        step: returns the output and leaves its gradients in ``inputs``.
    """
    for leaf in inputs:
        leaf.grad = None
    out, bytes_at_peak = peak(step, device)
    return None if bytes_at_peak is None else bytes_at_peak - sum(tensor.nbytes for tensor in (out, *inputs))


def once_ms(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of ``call`` and its wall time in ms: for what happens once, the work of the host included."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, 1e3 * (time.perf_counter() - start)


def matmul_tflops(dtype: torch.dtype, device: torch.device, size: int, budget_ms: float) -> float:
    """What a square matrix product of ``size`` reaches here, in TFLOP/s: the ceiling of the others."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: left @ right, device=device, budget_ms=budget_ms) / 1e9


def explain(error: Exception) -> str:
    """Why a measurement failed, in one line of at most 300 characters."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[-1]}"  # Triton's compiler starts with the place and ends with the fault
    text = text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:297]}..."


def release() -> None:
    """Give GPU memory back after a failed or finished measurement; never fails itself."""
    if torch.cuda.is_available():
        gc.collect()
        # After a fault has ended this process's CUDA context, every later cell says so by itself.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def _elapsed_ms(call: Callable[[], object], device: torch.device, gradients: Sequence[Tensor]) -> float:
    for leaf in gradients:
        leaf.grad = None
    if device.type != "cuda":
        return once_ms(call, device)[1]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
