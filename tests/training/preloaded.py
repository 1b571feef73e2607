"""Ranks forked from a process that has imported everything: the seconds of imports are paid once, not by every rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["deepspeed", "peft", "datasets", "sparsetrain.cli", "sparsetrain.training.run"])


def run(commands: Sequence[Sequence[str]], log: Path, environment: dict[str, str]) -> None:
    """Run ``sparsetrain`` with each list of arguments in turn, in a session and with an environment of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    from sparsetrain.cli import main

    sys.exit(max(main(arguments) for arguments in commands))


class Fork:
    """Such a process, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, commands: Sequence[Sequence[str]], log: Path, environment: dict[str, str]) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"  # for the imports, as a run says it itself
        try:
            forkserver.ensure_running()
        finally:
            del os.environ["DS_ACCELERATOR"]
        self._process = FORKS.Process(target=run, args=(commands, log, environment))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
