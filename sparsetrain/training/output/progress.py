"""Progress of a run on rank 0: a bar on a terminal, otherwise a line per update."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
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
    plain line per :meth:`update`, behind the time of day:
    ``14:03:22 step 12/100  loss 3.214  lr 2.0e-04  grad 0.71  12,345 tok/s  left 0:42``.

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
        self._kept: TextIO | None = None
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
        line = f"step {step}/{self.total_steps}  {status}"
        if self._bar is not None:
            with suppress(Exception):
                self._bar.update(self._task, completed=step, status=status)
            self._keep_line(line)
        else:
            self.log(line)

    def restart_clock(self) -> None:
        """Ignore the time since the last update; call after an evaluation or a checkpoint."""
        self._clock = time.monotonic()

    def log(self, text: str) -> None:
        """Print a line, above the bar if there is one, and keep it."""
        if self._console is not None:
            shown = text if self._console.is_terminal else f"{time.strftime('%H:%M:%S')} {text}"
            # A failure to print must not stop the run, and cannot be reported either.
            with suppress(Exception):
                self._console.print(shown, markup=False)
            self._keep_line(text)

    def keep(self, file: Path, cleanup: ExitStack) -> None:
        """From now on append every line to a file too, with its date and time.

        Args:
            cleanup: Closing it closes the file, behind a line about the error that ends the run.
        """
        if self._console is None:
            return
        try:
            # Non-blocking: a pipe without a reader raises instead of blocking.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._kept = os.fdopen(os.open(file, flags, 0o666), "a", encoding="utf-8", errors="replace")
        except OSError as error:
            self.log(f"warning: {file} cannot be written ({error.strerror}); the run continues without it")
            return
        cleanup.push(self._keep_end)

    def relay(self, logger: logging.Logger, cleanup: ExitStack) -> None:
        """From now on log what a logger says too, from INFO on, such as which rows are left out.

        Args:
            cleanup: Closing it ends this.
        """
        if self._console is None:
            return
        handler = logging.Handler()
        handler.emit = lambda record: self.log(record.getMessage())  # type: ignore[method-assign]
        cleanup.callback(logger.setLevel, logger.level)
        cleanup.callback(logger.removeHandler, handler)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)

    def _keep_line(self, text: str) -> None:
        if self._kept is not None:
            with suppress(OSError, ValueError):
                self._kept.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                self._kept.flush()

    def _keep_end(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._keep_line(f"error: {error}" if str(error) else f"error: {type(error).__name__}")
        if self._kept is not None:
            with suppress(OSError):
                self._kept.close()
            self._kept = None

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
        with counting(label, self._console, say=self.log) as count:
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
