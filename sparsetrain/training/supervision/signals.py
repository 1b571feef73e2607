"""Handle signals that ask a run to stop.

SIGTERM comes from schedulers and spot machines, some time before they kill the process; SIGUSR1 from Slurm, at the time
set by ``--signal=USR1@SECONDS``; SIGHUP from a closed terminal. They mean: requeue the run. Ctrl-C (SIGINT) means that
a person stops it.

Before training begins there is nothing to save, and the run stops at once. Afterwards it completes its step or the
batch of an evaluation, saves a checkpoint, and its exit code tells whether to start it again.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from types import FrameType
from typing import Any

from sparsetrain.activity import activity

PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h (try again later): the exit code of a run that a scheduler stopped and that was saved."""
INTERRUPTED_TWICE = 130
"""The exit code that shells use for a process ended by Ctrl-C."""
PATIENCE = 10.0
"""Seconds for the main thread to stop at once: it may be in a library that ignores signals."""
PATIENCE_OF_A_PERSON = 3.0
"""The same after a second Ctrl-C."""

NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGHUP: "SIGHUP",
}


class Outcome(Enum):
    """How a run ended."""

    FINISHED = "finished"
    """All steps are done."""
    INTERRUPTED = "interrupted"
    """A person stopped it."""
    PREEMPTED = "preempted"
    """A scheduler stopped it; start it again with ``--resume``."""

    @property
    def exit_code(self) -> int:
        """The exit code of the process."""
        return PREEMPTED_EXIT_CODE if self is Outcome.PREEMPTED else 0


class Stopped(BaseException):
    """A run was asked to stop where nothing needs to be saved. Not an Exception, so that error handlers ignore it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


class StopSignals:
    """A context manager that turns signals into stop requests, and prints their effect at once.

    Until :meth:`hold` a request raises :class:`Stopped` in the main thread; afterwards it is stored until it is polled.
    A second SIGINT interrupts at once. Other signals may arrive several times: DeepSpeed's launcher sends SIGTERM after
    a Ctrl-C, which every rank gets too, and after the first rank has exited.

    Outside of the main thread, where Python cannot handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.preempted = False
        self.interrupted = False
        self.before_exit: Callable[[Outcome], None] = lambda outcome: None
        """Called before a process with a stuck main thread is ended, to tell other ranks the reason."""
        self._holding = False
        self._raised = False
        self._pressed = False
        self._passed_on: Outcome | None = None
        self._former: dict[int, Any] = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._thread = threading.Thread()
        self._end_at: tuple[float, int] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        # The signal is written to a socket that a thread reads: the main thread may be in a library for minutes.
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(
            target=self._listen, args=(self._ends[0],), name="sparsetrain-signals", daemon=True
        )
        self._thread.start()
        for number in NAMES:
            # nohup ignores SIGHUP; keep that.
            if number != signal.SIGHUP or signal.getsignal(number) == signal.SIG_DFL:
                self._former[number] = signal.signal(number, self._request)
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ends is None:
            return
        _active.remove(self)
        self._give_back()
        # Process pending signals before the end.
        self._ends[1].close()
        self._thread.join(1.0)
        self._ends = None

    def hold(self) -> None:
        """From now on there is progress to save: requests are stored until they are polled."""
        self._holding = True
        # A library swallowed an earlier request; it is honoured after the next step.
        self._end_at = None

    def pass_on(self, outcome: Outcome) -> None:
        """Stop because another rank was asked to. May be called in any thread. It does not count as a Ctrl-C of this
        rank, which may get its own."""
        self._passed_on = outcome
        _thread.interrupt_main(signal.SIGTERM)

    def pause(self, largest: Callable[[float], float]) -> None:
        """Stop here if a stop was requested: on any rank after :meth:`hold`, and before it on this rank, if a library
        swallowed the exception.

        Args:
            largest: Returns the maximum of a value over all ranks; a collective operation.

        Raises:
            Stopped: A stop was requested; after :meth:`hold` it is raised on all ranks.
        """
        asked = 2.0 if self.interrupted else float(self.preempted)
        if self._holding:
            asked = largest(asked)
        if asked:
            raise Stopped(Outcome.INTERRUPTED if asked > 1.0 else Outcome.PREEMPTED)

    def _give_back(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self._pressed
        self._pressed |= number == signal.SIGINT
        if number == signal.SIGINT or self._passed_on is Outcome.INTERRUPTED:
            self.interrupted = True
        else:
            self.preempted = True
        if again:
            raise KeyboardInterrupt
        if not self._holding and not self._raised:
            self._raised = True
            raise Stopped(Outcome.INTERRUPTED if self.interrupted else Outcome.PREEMPTED)

    # The thread.

    def _listen(self, end: socket.socket) -> None:
        presses = 0
        with end:
            while True:
                waiting = 3600.0 if self._end_at is None else max(0.0, self._end_at[0] - time.monotonic())
                end.settimeout(max(waiting, 0.01))
                try:
                    numbers = end.recv(64)
                except TimeoutError:
                    self._end()
                    continue
                if not numbers:
                    return
                for number in numbers:
                    if number in NAMES:
                        presses += number == signal.SIGINT
                        passed_on = number == signal.SIGTERM and self._passed_on is Outcome.INTERRUPTED
                        self._answer(signal.SIGINT if passed_on else number, presses)

    def _answer(self, number: int, presses: int) -> None:
        """Print what will happen, and end the process if the main thread cannot.

        Args:
            presses: How many times this process got Ctrl-C.
        """
        again = number == signal.SIGINT and presses > 1
        if again:
            self._end_at = (time.monotonic() + PATIENCE_OF_A_PERSON, INTERRUPTED_TWICE)
        elif not self._holding and self._end_at is None:
            outcome = Outcome.INTERRUPTED if number == signal.SIGINT else Outcome.PREEMPTED
            self._end_at = (time.monotonic() + PATIENCE, outcome.exit_code)
        if os.environ.get("RANK", "0") == "0":
            print(f"{NAMES[signal.Signals(number)]}: {self._what_comes(number, again)}", file=sys.stderr, flush=True)

    def _what_comes(self, number: int, again: bool) -> str:
        if again:
            return "leaving at once"
        if not self._holding:
            return f"stopping now ({activity})"
        if activity.part.startswith("evaluating"):
            what = "stopping after this batch of the evaluation; the trained weights are saved"
        elif activity.part.startswith(("saving", "exporting", "drawing")):
            what = f"stopping after {activity.part}"
        else:
            what = "stopping after this step, with a checkpoint"
        return what + ("; Ctrl-C again leaves at once, without" if number == signal.SIGINT else "")

    def _end(self) -> None:
        if self._end_at is None or time.monotonic() < self._end_at[0]:
            return
        code = self._end_at[1]
        try:
            self.before_exit(Outcome.INTERRUPTED if self.interrupted else Outcome.PREEMPTED)
        finally:
            os._exit(code)


class ExitOnSignal:
    """Handles stop signals at the start and the end of a process, when no run handles them."""

    def __init__(self) -> None:
        self.code = PREEMPTED_EXIT_CODE
        """The exit code of the process: it should be started again until its work is done."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._leave)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        os._exit(self.code)


_active: list[StopSignals] = []
_masks = threading.local()


def _before_fork() -> None:
    """Block signals before a fork: a child inherits the handlers, and until it resets them, a signal to the child would
    reach the run."""
    if _active:
        _masks.former = signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)


def _after_fork() -> None:
    if (former := _masks.__dict__.pop("former", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _forget() -> None:
    """Reset the handlers in a forked process (a tokenisation worker): signals end it, and do not reach the run."""
    for signals in _active:
        with contextlib.suppress(ValueError):
            signals._give_back()
            for number in NAMES:
                signal.signal(number, signal.SIG_DFL)
    _active.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget)
