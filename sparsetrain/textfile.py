"""Read text files named by a user, or refuse them with the reason."""

from __future__ import annotations

import os
import stat
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsetrain.errors import SparsetrainError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_text(path: str | Path, called: str, error: type[SparsetrainError], most: int = 2**20) -> str:
    """The text of a small regular file in UTF-8, with or without a byte order mark.

    A pipe or a device is refused and not opened: it might never end, or never begin.

    Args:
        called: what messages call the file, such as ``deepspeed.config: zero3.json``.
        error: what is raised.
        most: bytes above which it is refused.

    Raises:
        SparsetrainError: of the class ``error``, with the reason.
    """
    with _told(called, error):
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            raise error(f"{called}: is {_KINDS.get(kind, 'no file')}, where a file is needed")
        # Some files of /proc wait for what to say, though they look regular.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise error(f"{called}: is larger than {most:,} bytes, the most that is read of such a file")
        return content.decode("utf-8-sig")


def check_readable(path: str | Path, called: str, error: type[SparsetrainError]) -> None:
    """Refuse a file that cannot be opened, before something is waited for; its content is for :func:`text_lines`.

    Args:
        called: what messages call the file.
        error: what is raised.

    Raises:
        SparsetrainError: of the class ``error``, with the reason.
    """
    with _told(called, error):
        if not stat.S_ISFIFO(os.stat(path).st_mode):  # opening a pipe takes what is in it
            open(path, "rb").close()


def text_lines(path: str | Path, called: str, error: type[SparsetrainError]) -> Iterator[str]:
    """The lines of a file of any size, or of a pipe, in UTF-8 with or without a byte order mark, each with its end.

    Args:
        called: what messages call the file.
        error: what is raised.

    Raises:
        SparsetrainError: of the class ``error``, with the reason, where reading comes to it.
    """
    with _told(called, error), open(path, encoding="utf-8-sig") as file:
        yield from file


@contextmanager
def _told(called: str, error: type[SparsetrainError]) -> Iterator[None]:
    """Say of which file a fault is."""
    try:
        yield
    except UnicodeDecodeError as fault:
        wide = fault.object.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        guess = "it begins as UTF-16 does" if wide else "its encoding is another"
        raise error(f"{called}: not a text file in UTF-8 ({guess}); save it as UTF-8") from None
    except (OSError, ValueError) as fault:  # a name with a NUL is a ValueError
        raise error(f"{called}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from fault
