"""What this process and its machine use, for every tracker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import psutil
import torch

from sparsetrain.training.output.attempt import attempt

GB = 1e9


class SystemUse:
    """Memory in GB and load in percent, read between steps: of the machine, this process and its GPU.

    The share of the CPU is of all cores for the machine, and of one core for the process, since the reading before. The
    GPU's memory is what all processes hold of it; its load needs the package ``nvidia-ml-py``.

    Args:
        device: The device of this process.
        say: Prints a line for the user.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self._say = say
        process = psutil.Process()
        self._readings: dict[str, Callable[[], float]] = {
            "cpu_percent": psutil.cpu_percent,
            "memory_gb": _machine_memory,
            "process_cpu_percent": process.cpu_percent,
            "process_memory_gb": lambda: process.memory_info().rss / GB,
        }
        if device.type == "cuda":
            self._readings["gpu_memory_gb"] = lambda: _gpu_memory(device)
            if find_spec("pynvml") is not None:
                self._readings["gpu_percent"] = lambda: torch.cuda.utilization(device)
        self.metrics()  # from which shares of time count

    def metrics(self) -> dict[str, float]:
        """The numbers by name. One that cannot be read is left out from then on, with a warning."""
        found: dict[str, float] = {}
        for name, read in [*self._readings.items()]:
            add = partial(_add, found, f"system/{name}", read)
            if not attempt(f"system/{name} cannot be read", add, self._say, "it is left out"):
                del self._readings[name]
        return found


def _add(found: dict[str, float], name: str, read: Callable[[], float]) -> None:
    found[name] = float(read())


def _machine_memory() -> float:
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) / GB


def _gpu_memory(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GB
