"""Atomic and durable file writes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path

LARGEST = 1 << 26
"""Maximum bytes of a JSON or YAML file that a run wrote."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: to a temporary file that is flushed to the disk and renamed; text as UTF-8.

    What was left at the place beside it, a pipe or a link too, is removed, not opened.

    Raises:
        OSError: it cannot be written, and is what it was. The error names it, which those of a full disk do not.
    """
    partial = path.with_name(f"{path.name}.part")
    if partial.is_dir() and not partial.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, and a file of that name is written first", str(partial))
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def existing_part(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def folder_fault(folder: Path) -> str | None:
    """Why nothing can be written in a folder, which may be made later: a phrase; None if something can.

    It is tried, with a folder that is removed at once: the rights of root and of ``/proc`` say nothing.
    """
    existing = folder
    try:
        existing = existing_part(folder)
        with tempfile.TemporaryDirectory(prefix=".sparsetrain-", dir=existing):
            return None
    except OSError as error:
        return f"nothing can be written in {existing} ({error.strerror})"


def flush(path: Path) -> None:
    """fsync a file or folder, so that a rename is not written to the disk before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """fsync a folder and everything below it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def remove_path(path: Path) -> None:
    """Remove ``path`` if it exists: a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def copy_files(source: Path, target: Path, leave_out: Collection[str] = ()) -> None:
    """Copy the content of a folder, except some names, into another one.

    Contents alone: the modes of a run folder need not be those of one to give away.
    """
    for path in source.rglob("*"):
        place = path.relative_to(source)
        if place.parts[0] in leave_out:
            continue
        if path.is_dir():
            (target / place).mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, target / place)


def read_bytes(file: Path) -> bytes:
    """A small file that a run wrote. Not a pipe, which would be waited for, or anything without an end.

    Raises:
        OSError, ValueError: it is none, or cannot be read.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file.name} is not a file")
    if found.st_size > LARGEST:
        raise ValueError(f"{file.name} has {found.st_size:,} bytes, too many for what it should hold")
    return file.read_bytes()
