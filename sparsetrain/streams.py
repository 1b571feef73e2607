"""Standard output and error without exceptions: a closed pipe must not stop a run."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO, errno.ESTALE)
"""Error numbers of streams that are closed permanently."""


class Stream:
    """A text stream that records errors instead of raising them; other methods are those of the wrapped stream.

    Text that its encoding does not know is written in escapes. After an error that may pass (a full disk), the next
    text is tried again; where the other side has gone, what is written from then on goes nowhere.

    Args:
        open_at_start: whether there was such a stream when the process started.
    """

    def __init__(self, below: Any, open_at_start: bool = True) -> None:
        self._below = below
        self._open_at_start = open_at_start
        self.fault: Exception | None = None
        """The first write error."""

    def write(self, text: str) -> int:
        """Write; errors are recorded."""
        with self._faults_noted():
            if not self._open_at_start:
                raise OSError(errno.EBADF, "it was closed before the start")
            try:
                self._below.write(text)
            except UnicodeEncodeError as fault:
                self.fault = self.fault or fault
                encoding = self._below.encoding
                self._below.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several lines; errors are recorded."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush; errors are recorded."""
        with self._faults_noted():
            self._below.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal; one that is closed is none."""
        try:
            return bool(self._below.isatty())
        except (OSError, ValueError):
            return False

    def flush_finally(self) -> None:
        """Flush for the last time, and discard the buffers of a broken stream so that the exit does not fail."""
        fault, self.fault = self.fault, None
        self.flush()
        if self.fault is not None:
            self._leave()
        self.fault = fault or self.fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    @contextmanager
    def _faults_noted(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as fault:  # a ValueError from a file that is closed
            self.fault = self.fault or fault
            if isinstance(fault, ValueError) or fault.errno in GONE:
                self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = self._below.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


@dataclass(frozen=True)
class Streams:
    """Standard output and standard error."""

    out: Stream
    err: Stream

    @property
    def lost_output(self) -> Exception | None:
        """The error because of which standard output is incomplete; None if a reader closed the pipe."""
        fault = self.out.fault
        return None if isinstance(fault, BrokenPipeError) else fault


@contextmanager
def forgiving() -> Iterator[Streams]:
    """A context in which printing does not raise; at its end the streams are flushed."""
    closed = _open_standard_files()
    former = sys.stdout, sys.stderr
    streams = Streams(Stream(sys.stdout, 1 not in closed), Stream(sys.stderr, 2 not in closed))
    sys.stdout, sys.stderr = streams.out, streams.err
    try:
        yield streams
    finally:
        streams.out.flush_finally()
        streams.err.flush_finally()
        sys.stdout, sys.stderr = former


def reader_gone() -> bool:
    """Whether who read standard output has closed the pipe, so that nothing more need be printed."""
    return isinstance(getattr(sys.stdout, "fault", None), BrokenPipeError)


def _open_standard_files() -> set[int]:
    """Open nothing in the place of what was closed before the start: else the first file that a run opens, such as a
    checkpoint, would get its number, and whatever a library prints.

    Returns:
        The numbers that were closed.
    """
    closed = set()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    return closed
