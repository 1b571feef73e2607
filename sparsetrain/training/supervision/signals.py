"""Signals that ask a run to stop. What they come to depends on what there is to lose.

SIGTERM comes from schedulers and from owners of spot machines, some time before they kill; SIGUSR1 from Slurm, as early
as its ``--signal=USR1@SECONDS`` says; SIGHUP from a terminal that has gone. They mean: requeue. Ctrl-C (SIGINT) means
that a person has had enough.

Until training begins there is nothing to save, and the run ends where it is. From then on it ends its step, or the
batch of an evaluation, saves a checkpoint, and says by its exit code what to do next.
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
"""EX_TEMPFAIL of sysexits.h: try again later. What a run that a scheduler stopped exits with, its checkpoint saved."""
INTERRUPTED_TWICE = 130
"""What shells make of a process that Ctrl-C ended."""
PATIENCE = 10.0
"""Seconds that a main thread gets which is to stop at once: it may be in a library that looks at no signal."""
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
    """It took all its steps."""
    INTERRUPTED = "interrupted"
    """A person stopped it."""
    PREEMPTED = "preempted"
    """A scheduler stopped it; it is to be started again with ``--resume``."""

    @property
    def exit_code(self) -> int:
        """Of the process."""
        return PREEMPTED_EXIT_CODE if self is Outcome.PREEMPTED else 0


class Stopped(BaseException):
    """A run was asked to stop where it has nothing to lose. No error, so that nothing takes it for one."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


class StopSignals:
    """While used as a context manager, turns the signals into requests, and says at once what will come of them.

    Until :meth:`hold` a request raises :class:`Stopped` wherever the main thread is; from then on it waits to be asked
    for. A second SIGINT interrupts at once. The others may come more than once: DeepSpeed's launcher answers a Ctrl-C,
    which every rank gets too, with SIGTERM, and so it does when the first rank has left.

    Outside of the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.preempted = False
        self.interrupted = False
        self.last_words: Callable[[Outcome], None] = lambda outcome: None
        """Called before a process is ended whose main thread is stuck: to tell other ranks why."""
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
        # From the system's own handler straight to a thread: the main thread may be in a library for minutes.
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(
            target=self._listen, args=(self._ends[0],), name="sparsetrain-signals", daemon=True
        )
        self._thread.start()
        for number in NAMES:
            # A terminal that goes is ignored where nohup says so.
            if number != signal.SIGHUP or signal.getsignal(number) == signal.SIG_DFL:
                self._former[number] = signal.signal(number, self._request)
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ends is None:
            return
        _active.remove(self)
        self._give_back()
        # What came is answered before the end.
        self._ends[1].close()
        self._thread.join(1.0)
        self._ends = None

    def hold(self) -> None:
        """From now on there is something to lose: requests wait for whoever asks."""
        self._holding = True
        # An earlier one was swallowed, and is heeded with the next step.
        self._end_at = None

    def pass_on(self, outcome: Outcome) -> None:
        """Stop because another rank was asked to. Called in any thread; a Ctrl-C that came there is none here, where
        one of this rank's own may have come, or be to come."""
        self._passed_on = outcome
        _thread.interrupt_main(signal.SIGTERM)

    def pause(self, largest: Callable[[float], float]) -> None:
        """Stop here where that was asked for: of any rank once there is something to lose, and before of this one,
        where a library has swallowed what was raised.

        Args:
            largest: the largest value over all ranks, which then all call this.

        Raises:
            Stopped: it was; once there is something to lose, on all ranks alike.
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
        """Say what will happen, and see to it where the main thread cannot.

        Args:
            presses: how often Ctrl-C has come to this process.
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
            what = "stopping after this batch of the evaluation, with all that was trained saved"
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
            self.last_words(Outcome.INTERRUPTED if self.interrupted else Outcome.PREEMPTED)
        finally:
            os._exit(code)


class Ends:
    """Answers a request to stop with an exit code while no run does: in the first moments of a process and the last."""

    def __init__(self) -> None:
        self.code = PREEMPTED_EXIT_CODE
        """Of the process: to be started again until it has done what it is for."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._leave)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        os._exit(self.code)


_active: list[StopSignals] = []
_masks = threading.local()


def _before_fork() -> None:
    """A child inherits the handlers and the way to the thread that answers: until it has forgotten them, a signal to it
    would be taken for one to the run."""
    if _active:
        _masks.former = signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)


def _after_fork() -> None:
    if (former := _masks.__dict__.pop("former", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _forget() -> None:
    """In a process that was forked (workers that tokenise): signals end it, and are no news to the run."""
    for signals in _active:
        with contextlib.suppress(ValueError):
            signals._give_back()
            for number in NAMES:
                signal.signal(number, signal.SIG_DFL)
    _active.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget)
