"""The ``sparsetrain`` command, one file per command. Imports are lazy: help is fast and recipes need no torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any, NoReturn

__all__ = ["app", "main", "script"]


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Let the threads of a CPU soon sleep where they wait for one another.

    OpenMP's spin for a millisecond at each operation. Where other programs, or the quota of a container, take the core
    of the thread that is waited for, that is most of a run. It is 1,000 turns where OpenMP itself knows of fewer cores
    than threads, but it does not see others. What is set already stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = "1000"


wait_asleep(os.environ)  # OpenMP reads it when torch is imported, which the modules of this package do


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
