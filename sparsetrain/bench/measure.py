"""Time, memory, clocks and watts of one callable, the order of contenders, and failures as one line of text."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

MIB = 2**20
LONG_MS = 100.0
"""Calls longer than this are repeated a few times only; what the caches hold makes no difference to them."""
REPEATS = 3
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Size of the copy that measures the bandwidth, much larger than any cache."""

T = TypeVar("T")


class Unavailable(Exception):
    """An implementation cannot run here. The message is the whole reason."""


def shuffled(contenders: Iterable[T], length: int) -> list[T]:
    """The order in which they are measured at one length: always the same, and another at other lengths."""
    order = list(contenders)
    random.Random(length).shuffle(order)
    return order


def median_ms(
    call: Callable[[], object], *, device: torch.device, budget_ms: float, gradients: Sequence[Tensor] = ()
) -> float:
    """Median time of ``call`` in ms. The first call, which may compile, is not counted.

    On CUDA ``triton.testing.do_bench`` repeats a short call: it warms up, and empties the L2 cache before each.

    Args:
        budget_ms: Total time for repetitions, in ms.
        gradients: Leaves ``[...]`` whose ``.grad`` is reset before every repetition, so that it does not accumulate.
    """
    _elapsed_ms(call, device, gradients)
    first = _elapsed_ms(call, device, gradients)
    if device.type == "cuda" and first < LONG_MS:
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=budget_ms, grad_to_none=gradients or None, return_mode="median")
    repeats = max(REPEATS, min(100, int(budget_ms / max(first, 1e-3))))
    return median([first, *(_elapsed_ms(call, device, gradients) for _ in range(repeats - 1))])


def clock_and_power(device: torch.device) -> tuple[float, float] | None:
    """The clock of the SMs in MHz and the power in watts, which is NVML's average over about a second; None where
    nothing tells."""
    with suppress(Exception):  # no NVML, or one that may not be asked
        if device.type == "cuda":
            return torch.cuda.clock_rate(device), torch.cuda.power_draw(device) / 1e3
    return None


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


def extra_mib(step: Callable[[], Tensor], inputs: Sequence[Tensor], device: torch.device) -> float | None:
    """Peak memory in MiB of a forward and backward pass beyond inputs, output and gradients; None without CUDA.

    Args:
        step: Runs the pass, returns the output ``[...]``, and leaves gradients in ``inputs``.
        inputs: Leaves of any shape ``[...]``.
    """
    for leaf in inputs:
        leaf.grad = None
    out, bytes_at_peak = peak(step, device)
    return None if bytes_at_peak is None else (bytes_at_peak - sum(each.nbytes for each in (out, *inputs))) / MIB


def once_ms(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of ``call`` and its wall time in ms: for what happens once, the work of the host included."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, 1e3 * (time.perf_counter() - start)


def matmul_tflops(dtype: torch.dtype, device: torch.device, size: int, budget_ms: float) -> float:
    """The TFLOP/s of a square matrix product of ``size`` on this device, the ceiling of other operations."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: left @ right, device=device, budget_ms=budget_ms) / 1e9


def copy_gbps(device: torch.device, budget_ms: float) -> float:
    """The bandwidth of a copy within device memory in GB/s, counting bytes read and written."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device=device, budget_ms=budget_ms) / 1e6


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A step as a CUDA graph, which is how decoding runs: the host's work for each launch is not measured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and fills caches of plans and tables
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def explain(error: BaseException) -> str:
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


def _elapsed_ms(call: Callable[[], Any], device: torch.device, gradients: Sequence[Tensor]) -> float:
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
