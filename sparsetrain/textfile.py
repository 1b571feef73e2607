"""Read small text files named by a user, or refuse them with the reason; never block on a pipe."""

from __future__ import annotations

import os
import stat
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
    """The text of a regular file in UTF-8, with or without a byte order mark.

    A pipe or a device is refused and not opened: it might never end, or never begin.

    Args:
        called: what messages call the file, such as ``deepspeed.config: zero3.json``.
        error: what is raised.
        most: bytes above which it is refused.

    Raises:
        SparsetrainError: of the class ``error``, with the reason.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            raise error(f"{called}: is {_KINDS.get(kind, 'no file')}, where a file is needed")
        # Some files of /proc wait for what to say, though they look regular.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as fault:  # a name with a NUL is a ValueError
        raise error(f"{called}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from fault
    if len(content) > most:
        raise error(f"{called}: is larger than {most:,} bytes, the most that is read of such a file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        guess = "it begins as UTF-16 does" if wide else "its encoding is another"
        raise error(f"{called}: not a text file in UTF-8 ({guess}); save it as UTF-8") from None
