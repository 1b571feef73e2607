"""Run optional output (metrics, W&B, reports, pictures): a failure becomes a warning and does not stop the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsetrain.errors import first_line


def attempt(what: str, act: Callable[[], Any], say: Callable[[str], None], instead: str) -> bool:
    """Run ``act``; if it fails, print a warning. Returns whether it succeeded.

    Args:
        what: The start of the warning: what failed.
        say: Prints the warning.
        instead: The end of the warning: how the run continues.
    """
    try:
        act()
    # A library may raise anything, even SystemExit.
    except (Exception, SystemExit) as error:
        say(f"warning: {what} ({brief(error)}); {instead}")
        return False
    return True


def brief(error: BaseException) -> str:
    """An error in one line; for errors of the operating system, the message and the file without the number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {first_line(error)[:200]}" if str(error).strip() else type(error).__name__
