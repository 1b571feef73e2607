"""What the device did in one step, from the profiler's record: computing, waiting for other ranks, copying to the host.

Only the device's own events are recorded, a few microseconds each, so that a recorded step can be a timed one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Spans = list[tuple[float, float]]
"""Intervals, sorted and disjoint."""


@dataclass(frozen=True)
class Busy:
    """Seconds of one recorded step on one rank."""

    exchange: float
    """In which kernels of all-to-all or point-to-point run; a rank that is ahead waits for the others in them."""
    waiting: float
    """In which kernels of NCCL run, of any collective, and nothing is computed."""
    copying: float
    """In which tensors are copied from or to the host, mostly beneath computation."""
    idle: float
    """In which nothing runs, or copies alone: for the host's work, or for its memory."""
    total: float
    """From the first event to the last."""


def summarise(events: Iterable[tuple[str, float, float]]) -> Busy | None:
    """Events of one device as name, start and end in microseconds; None without any."""
    collectives, exchanges, copies, computing = [], [], [], []
    for name, start, end in events:
        if "nccl" in name.lower():
            collectives.append((start, end))
            if "SendRecv" in name:
                exchanges.append((start, end))
        elif name.startswith("Memcpy") and ("HtoD" in name or "DtoH" in name):
            copies.append((start, end))
        else:
            computing.append((start, end))
    everything = union([*collectives, *copies, *computing])
    if not everything:
        return None
    total = everything[-1][1] - everything[0][0]
    computed, working = union(computing), union([*computing, *collectives])
    return Busy(
        exchange=length(union(exchanges)) / 1e6,
        waiting=(length(working) - length(computed)) / 1e6,
        copying=length(union(copies)) / 1e6,
        idle=(total - length(working)) / 1e6,
        total=total / 1e6,
    )


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """Overlapping intervals joined."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def length(spans: Spans) -> float:
    """The sum of the lengths of disjoint intervals."""
    return sum(end - start for start, end in spans)


class Recorder:
    """Records a device between :meth:`start` and :meth:`stop`; does nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.profiler: Any = None

    def start(self) -> None:
        """Begin, if the device is a GPU."""
        if self.device.type == "cuda":
            self.profiler = profile(activities=[ProfilerActivity.CUDA])
            self.profiler.start()

    def stop(self) -> Busy | None:
        """End, and say what happened; None where nothing was recorded."""
        if self.profiler is None:
            return None
        found, self.profiler = self.profiler, None
        torch.cuda.synchronize(self.device)
        found.stop()
        events = (event for event in found.events() or () if event.device_type == DeviceType.CUDA)
        return summarise((each.name, each.time_range.start, each.time_range.end) for each in events)
