"""The ``sparsetrain`` command, one file per command. Imports are lazy: help is fast and recipes need no torch."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["app", "main", "script"]


def script() -> NoReturn:
    """Run the command as a process. Ctrl-C ends it quietly from here on, before anything large is imported."""
    from sparsetrain.cli.interrupt import leave_on_interrupt

    leave_on_interrupt()
    from sparsetrain.cli.entry import run_as_process

    run_as_process()


def __getattr__(name: str) -> Any:
    """Import the commands only when one is wanted."""
    if name in ("app", "main"):
        from sparsetrain.cli import entry

        return getattr(entry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
