"""Signals that ask a run to stop: it ends its step, saves a checkpoint, and says by its exit code what to do next.

SIGTERM comes from schedulers and from owners of spot machines, some time before they kill; SIGUSR1 from Slurm, as early
as its ``--signal=USR1@SECONDS`` says. Both mean: requeue. Ctrl-C (SIGINT) means that a person has had enough.
"""

from __future__ import annotations

import signal
from enum import Enum
from types import FrameType
from typing import Any

PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. What a run that a scheduler stopped exits with, its checkpoint saved."""


class Outcome(Enum):
    """How a run ended."""

    FINISHED = "finished"
    """It took all its steps."""
    INTERRUPTED = "interrupted"
    """A person stopped it."""
    PREEMPTED = "preempted"
    """A scheduler stopped it; it is to be started again with ``--resume``."""


class StopSignals:
    """While used as a context manager, turns the signals into requests. A second SIGINT interrupts at once.

    The others may come more than once: DeepSpeed's launcher answers a Ctrl-C, which every rank gets too, with SIGTERM,
    and so it does when the first rank has left.
    """

    def __init__(self) -> None:
        self.preempted = False
        self.interrupted = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(number, self._former[number])
        else:
            self.preempted = True
