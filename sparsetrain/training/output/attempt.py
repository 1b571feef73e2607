"""What only tells of a run stops nothing: metrics, W&B, reports and pictures that fail become a warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsetrain.errors import first_line


def attempt(what: str, act: Callable[[], Any], say: Callable[[str], None], instead: str) -> bool:
    """Do what only tells of a run; returns whether it went well.

    Args:
        what: what cannot be done if it does not, for the warning.
        say: prints the warning.
        instead: what comes instead, for the warning.
    """
    try:
        act()
    # A library may end in anything, sys.exit() too.
    except (Exception, SystemExit) as error:
        say(f"warning: {what} ({brief(error)}); {instead}")
        return False
    return True


def brief(error: BaseException) -> str:
    """An error in one line; of the system's own errors, what they say of their file and no number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {first_line(error)[:200]}" if str(error).strip() else type(error).__name__
