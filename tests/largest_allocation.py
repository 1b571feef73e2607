"""The largest allocation within a call, also inside of operations, which a dispatch mode does not see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def on_cpu(run: Callable[[], object]) -> int:
    """Bytes of the largest allocation on the host."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def on_cuda(run: Callable[[], object]) -> int:
    """Bytes of the largest allocation on the current CUDA device."""
    record = torch.cuda.memory._record_memory_history
    record("all", context=None, clear_history=True)
    try:
        run()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        record(None)
    return max(entry["size"] for trace in traces for entry in trace if entry["action"] == "alloc")
