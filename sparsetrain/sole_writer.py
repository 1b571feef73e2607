"""One process at a time writes a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sparsetrain.cache_folder import cache_folder
from sparsetrain.errors import RecipeError


@contextmanager
def sole_writer(option: str, file: Path | None) -> Iterator[None]:
    """Keep other processes of this machine from writing a file meanwhile; of None, nothing.

    The lock is in the cache folder, so that nothing is left beside the file. Where that cannot be written, there is
    none.

    Args:
        option: what names the file, for the message.

    Raises:
        RecipeError: another process writes it.
    """
    if file is None:
        yield
        return
    name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    lock = FileLock(Path(cache_folder(), f"sparsetrain-{name}.lock"), timeout=0)
    try:
        Path(cache_folder()).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RecipeError(f"another process writes {option} {file}; wait for its end, or name another file") from None
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()
