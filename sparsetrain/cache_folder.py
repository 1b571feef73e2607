"""The cache folder of Hugging Face's libraries, and the message for errors when it is full or not writable."""

from __future__ import annotations

import errno
import os

FIXES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "make it a folder",
    errno.ENOTDIR: "make it a folder",
    errno.EEXIST: "make it a folder",
}
"""The fix for a cache that cannot be written."""
WITHOUT_ROOM = ("not enough disk space", "no space left on device", "disk quota exceeded")
"""Messages of libraries that drop the error number."""


def cache_folder() -> str:
    """``HF_HOME``, or where Hugging Face's libraries put it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")


def cache_fault(error: BaseException, places: tuple[str, ...] = ()) -> str | None:
    """The fault of the cache that an error of a library shows: it is full, or cannot be written to; None if it says
    something else.

    Args:
        places: further folders that count as the cache (``HF_DATASETS_CACHE``).
    """
    found: BaseException | None = error
    while found is not None:
        number = found.errno if isinstance(found, OSError) else None
        if number is None and any(words in str(found).lower() for words in WITHOUT_ROOM):
            number = errno.ENOSPC
        if number in (errno.ENOSPC, errno.EDQUOT) or (number in FIXES and _lies_in(found, (cache_folder(), *places))):
            return (
                f"the cache of models and data in {cache_folder()} cannot be written ({found}); {FIXES[number or 0]}, "
                "or set HF_HOME to a folder on another disk"
            )
        found = found.__cause__ or found.__context__
    return None


def _lies_in(error: BaseException, folders: tuple[str, ...]) -> bool:
    """Whether the file that a system error names is in one of the folders. Reading needs rights too, elsewhere."""
    name = getattr(error, "filename", None)
    path = os.path.realpath(str(name)) if name else ""
    return any(f"{path}{os.sep}".startswith(os.path.realpath(folder) + os.sep) for folder in folders)
