"""The current activity of this process, for error messages and for the supervision by other ranks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Activity:
    """The step and the part of it in which the main thread is. Only the main thread writes; setting it is cheap.

    Every rank calls :meth:`at` in the same order, so of two ranks that do not move, the one with the lower ``order``
    keeps the other waiting.
    """

    part: str = "start"
    """A description of the activity: ``backward``, ``saving a checkpoint``."""
    step: int = 0
    """Optimizer step, 1 being the first; 0 outside of the steps."""
    order: int = 0
    """Calls of :meth:`at` so far."""
    moves: int = 0
    """Signs of progress so far: calls of :meth:`at` and :meth:`moved`."""
    timed: bool = False
    """Whether a time without progress counts. Not before the first step: downloads and tokenisation take what they
    take, and give no sign meanwhile."""

    def at(self, part: str, step: int = 0) -> None:
        """Enter ``part``; every rank must do so."""
        self.part, self.step = part, step
        self.order += 1
        self.moves += 1

    def moved(self) -> None:
        """Show progress within the part; each rank in its own time."""
        self.moves += 1

    def moving(self, callback: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``callback`` so that its calls count as progress."""

        def call(*arguments: Any) -> None:
            self.moved()
            callback(*arguments)

        return call

    def reset(self) -> None:
        """Reset for another run in this process."""
        self.part, self.step, self.order, self.moves, self.timed = "start", 0, 0, 0, False

    def __str__(self) -> str:
        return f"step {self.step}, {self.part}" if self.step else self.part


activity = Activity()
"""The activity of this process."""


def waits_for_others() -> bool:
    """Whether the main thread is inside a collective of torch.distributed, by its call stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if os.path.basename(frame.f_code.co_filename) in ("distributed_c10d.py", "_functional_collectives.py"):
            return True
        frame = frame.f_back
    return False
