"""Counted work with the time that is left: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PAUSE = 10.0
"""Seconds between lines."""

Count = Callable[[int, int], None]
"""Takes what is done, and all there is to do."""


@contextmanager
def counting(
    label: str, console: Console, *, pause: float = PAUSE, say: Callable[[str], None] | None = None
) -> Iterator[Count]:
    """Show counted work: ``evaluating: 12 of 40, 1:05 left``.

    Yields a function to call with what is done and all there is. What its first call says is done took no time here.

    Args:
        pause: seconds between lines, where the console is no terminal. Shorter work has no line.
        say: prints such a line; by default the console does, behind the time of day.
    """
    clock = Clock()
    if not console.is_terminal:
        yield _lines(label, say or partial(_say, console), clock, pause)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f} of {task.total:.0f}{task.fields[left]}"),
    )
    with Progress(*columns, console=console, expand=True, transient=True) as bar:
        task = bar.add_task(label, left="")

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, left=clock.said(done, total))

        yield update


class Clock:
    """How long the rest of counted work takes, if it goes on as it did."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None

    def said(self, done: int, total: int) -> str:
        """``, 1:05 left``; empty where nothing is known, or nothing is left."""
        now = time.monotonic()
        # The first count is often that of the first piece of work, which took longer than others will.
        self._start = self._start or (done, now)
        before, begun = self._start
        if done in (before, total):
            return ""
        return f", {clock_time((total - done) * (now - begun) / (done - before))} left"


def clock_time(seconds: float) -> str:
    """``1:05`` or ``2:01:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _say(console: Console, line: str) -> None:
    # A failure to print must not stop the work, and cannot be reported either.
    with suppress(Exception):
        console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, highlight=False, soft_wrap=True)


def _lines(label: str, say: Callable[[str], None], clock: Clock, pause: float) -> Count:
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        left, now = clock.said(done, total), time.monotonic()
        if now - last >= pause:
            last = now
            say(f"{label}: {done} of {total}{left}")

    return update
