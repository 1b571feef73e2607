"""Read ``metrics.jsonl`` line by line: what the pictures and pages of a run show of it."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
LAYER = re.compile(r"(.+)/layer_(\d+)")
"""A metric of one layer: ``sparsek/kept_mass/layer_03``."""
FINISHED = "finished"
"""1 in the last line of a run that has done all it is to do, with the export and the last evaluation."""
PLANNED_STEPS = "planned_steps"
"""All steps that a run is to take, in a line whenever it begins or goes on, and in its last one; early stopping takes
fewer."""
BOOKKEEPING = frozenset((FINISHED, PLANNED_STEPS))
"""What a run records for the commands that read its folder: no chart of it is drawn."""
CURVES = ("loss", "lr", "tokens", "tokens_per_second", "peak_memory_gb", "mfu", FINISHED, PLANNED_STEPS)
"""Metrics that are kept for every step at which they are recorded."""

Points = list[tuple[int, float]]
"""Steps and values, in the order of the file."""


@dataclass
class Metrics:
    """The content of a file of metrics. What is not finite or cannot be read is counted and left out."""

    curves: dict[str, Points] = field(default_factory=lambda: {name: [] for name in CURVES})
    """By the name of a metric, one of :data:`CURVES`."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The lines that evaluations wrote, whole."""
    layers: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    """The first and the last value by metric (``attention/density``) and layer."""
    once: dict[str, float] = field(default_factory=dict)
    """The other numbers of step 0, which do not change in a run."""
    unreadable: int = 0
    """Lines that are no metrics."""
    nonfinite: int = 0
    """Steps whose loss was not a finite number."""

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        points = self.curves[name]
        return points[-1][1] if points else None

    def median(self, name: str) -> float | None:
        """The median of a curve."""
        points = self.curves[name]
        return statistics.median(value for _, value in points) if points else None

    def largest(self, name: str) -> float | None:
        """The largest value of a curve."""
        return max((value for _, value in self.curves[name]), default=None)

    def add(self, line: dict[str, Any]) -> None:
        """Take a line of the file.

        Raises:
            TypeError: it has no step.
        """
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise TypeError("no step")
        if "loss" in line and number(line["loss"]) is None:
            self.nonfinite += 1
        if any(name.startswith("eval/") for name in line):
            self.evaluations.append(line)
        for name, given in line.items():
            value = number(given)
            if value is None:
                continue
            if name in CURVES:
                self.curves[name].append((step, value))
            elif (found := LAYER.fullmatch(name)) is not None:
                of_layers = self.layers.setdefault(found[1], {})
                layer = int(found[2])
                of_layers[layer] = (of_layers.get(layer, (value,))[0], value)
            elif step == 0 and name != "step" and not name.startswith("eval/"):
                self.once[name] = value


def read_metrics(path: Path) -> Metrics:
    """The metrics in a file of any length.

    Raises:
        ValueError: it is not a file.
        OSError: it cannot be read.
    """
    metrics = Metrics()
    for line in _lines(path):
        try:
            metrics.add(json.loads(line))
        except (ValueError, TypeError, AttributeError, RecursionError):
            metrics.unreadable += 1
    return metrics


def number(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def thinned(points: Points, most: int) -> Points:
    """At most about ``most`` points: the lowest and the highest of each of equally many steps, and both ends."""
    if len(points) <= most:
        return points
    every = math.ceil(2 * len(points) / most)
    found = points[:1]
    for start in range(1, len(points) - 1, every):
        part = points[start : min(start + every, len(points) - 1)]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        found += sorted(ends)
    return [*found, points[-1]]


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():  # opening a pipe would block
        raise ValueError(f"{path} is not a file")
    # An editor may have put a byte order mark before the first line.
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            if line.strip():
                yield line
