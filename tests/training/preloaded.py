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
from subprocess import CompletedProcess
from typing import Any, TextIO

from training import drafts

PRELOADED = [
    *("deepspeed", "torch._dynamo", "deepspeed.module_inject.auto_ep_layer"),
    *("peft", "datasets.packaged_modules.json.json", "transformers.models.llama.modeling_llama"),
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin"),
    *("datasets.io.generator", "datasets.packaged_modules.generator.generator", "numpy.ctypeslib", "setuptools"),
    *("sparsetrain.cli.entry", "sparsetrain.training.run", "sparsetrain.evaluation.html.page", "rich._emoji_codes"),
    *("training.preloaded", "training.warm"),
]
"""What a run imports, also that which it imports late."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


def run(program: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    """Run a program with its arguments as ``python -c`` would, in a session and with an environment of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    drafts.draw_nothing()
    sys.argv = ["-c", *program[1:]]
    exec(compile(program[0], "<program>", "exec"), {"__name__": "__main__"})


def ensure_running() -> None:
    """Start the process that imports, unless it runs."""
    # For the imports: as a run says it itself, and as Python 3.11 does not tell that process where the tests are.
    needed = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    before = {name: os.environ.get(name) for name in needed}
    os.environ |= needed
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Fork:
    """Such a process, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, program: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        ensure_running()
        self._process = FORKS.Process(target=run, args=(program, log, environment))
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


def forked_run(command: Sequence[str], *, stdout: TextIO, env: dict[str, str], **_: Any) -> CompletedProcess:
    """``subprocess.run`` of ``python -m MODULE ...``, in such a process; both streams go to the file ``stdout``."""
    assert command[:2] == [sys.executable, "-m"]
    program = f"import runpy; runpy.run_module({command[2]!r}, run_name='__main__', alter_sys=True)"
    return CompletedProcess(command, Fork([program, *command[3:]], Path(stdout.name), env).wait())
