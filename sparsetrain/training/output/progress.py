"""Progress of a run on rank 0: a bar on a terminal, otherwise a line per update."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from sparsetrain.time_left import clock_time, counting

WINDOW = 20
"""Number of updates over which tokens per second and remaining time are averaged."""


class Progress:
    """Shows step, loss, learning rate, gradient norm, tokens per second and the time left.

    Use as a context manager. On a terminal this is one bar that stays below whatever :meth:`log` prints; otherwise a
    plain line per :meth:`update`: ``step 12/100  loss 3.214  lr 2.0e-04  grad 0.71  12,345 tok/s  left 0:42``.

    Args:
        total_steps: Optimizer steps of the whole run; set later by :meth:`begin` if not known yet.
        start_step: Steps already done, when resuming.
        tokens_per_step: Tokens of one optimizer step over all ranks.
        rank: Only rank 0 shows anything.
        file: The output file; standard error by default, which keeps standard output free for results.
    """

    def __init__(
        self,
        total_steps: int = 0,
        start_step: int = 0,
        tokens_per_step: int = 0,
        *,
        rank: int = 0,
        file: TextIO | None = None,
    ) -> None:
        self._clock = time.monotonic()
        self._intervals: deque[tuple[int, int, float]] = deque(maxlen=WINDOW)
        self._console = None if rank else Console(file=file or sys.stderr, highlight=False, soft_wrap=True)
        self._bar: RichProgress | None = None
        if self._console is not None and self._console.is_terminal:
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
            )
            self._bar = RichProgress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("train", status="")
        self.begin(total_steps, start_step, tokens_per_step)

    def begin(self, total_steps: int, start_step: int, tokens_per_step: int) -> None:
        """Set the number of steps, the number of completed steps, and the tokens per step."""
        self.total_steps, self.tokens_per_step, self._step = total_steps, tokens_per_step, start_step
        if self._bar is not None:
            self._bar.update(self._task, total=total_steps, completed=start_step)

    def __enter__(self) -> Progress:
        self.restart_clock()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, step: int, loss: float, lr: float, grad_norm: float | None = None, *, tokens: int | None = None
    ) -> None:
        """Show that ``step`` is done.

        Args:
            tokens: Tokens since the last update, if the steps did not have ``tokens_per_step`` each.
        """
        steps = step - self._step
        now = time.monotonic()
        self._intervals.append((steps, steps * self.tokens_per_step if tokens is None else tokens, now - self._clock))
        self._step, self._clock = step, now
        if self._console is None:
            return
        parts = [f"loss {loss:.3f}", f"lr {lr:.1e}"]
        if grad_norm is not None:
            parts.append(f"grad {grad_norm:.2f}")
        parts.append(f"{self.tokens_per_second:,.0f} tok/s")
        parts.append(f"left {clock_time(self.seconds_left)}")
        status = "  ".join(parts)
        if self._bar is not None:
            with suppress(Exception):
                self._bar.update(self._task, completed=step, status=status)
        else:
            self.log(f"step {step}/{self.total_steps}  {status}")

    def restart_clock(self) -> None:
        """Ignore the time since the last update; call after an evaluation or a checkpoint."""
        self._clock = time.monotonic()

    def log(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._console is not None:
            # A failure to print must not stop the run, and cannot be reported either.
            with suppress(Exception):
                self._console.print(text, markup=False)

    @contextmanager
    def counting(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Show counted work: a line at the start, then a bar on a terminal and elsewhere a line every few seconds, with
        the time left.

        Yields a function to call with ``done`` and ``total``.
        """
        if self._console is None or (self._bar is not None and self._bar.live.is_started):
            self.log(label)
            yield lambda done, total: None
            return
        if not self._console.is_terminal:
            self.log(label)
        with counting(label, self._console) as count:
            yield count
        if self._console.is_terminal:
            self.log(label)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks, averaged over the last updates; 0 before the first."""
        seconds = sum(interval[2] for interval in self._intervals)
        return sum(interval[1] for interval in self._intervals) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """Remaining seconds of training at the current speed, without evaluations and checkpoints."""
        steps = sum(interval[0] for interval in self._intervals)
        seconds = sum(interval[2] for interval in self._intervals)
        return (self.total_steps - self._step) * seconds / steps if steps else 0.0
