"""``sparsetrain generate`` as a process that is interrupted, or whose reader goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training.preloaded import Fork

COMMAND = [sys.executable, "-m", "sparsetrain.cli", "generate", "sparsetrain:tiny"]
ROWS = 200
FORKED = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
pipe = sys.argv.pop(1)
if pipe:
    os.dup2(os.open(pipe, os.O_WRONLY), 1)
from sparsetrain.cli import script
script()
"""
"""The command in a process that has imported everything, with its output in a pipe of that name, if there is one."""


def started(*arguments: str) -> subprocess.Popen[str]:
    """A process in which Ctrl-C arrives, however the tests were started."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"def f{row}("}) + "\n" for row in range(ROWS)))
    return str(file)


@pytest.fixture
def forked(tmp_path):
    """Starts the command in a fork; what it writes to no pipe is in the file ``log``."""
    started = []

    def start(*arguments: str, pipe: str = "") -> Fork:
        program = [FORKED, pipe, *COMMAND[3:], *arguments]
        started.append(Fork(program, tmp_path / "log", dict(os.environ)))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for(there, process):
    while not there():
        assert process.poll() is None
        time.sleep(0.05)


def test_ctrl_c_keeps_the_rows_that_are_done(forked, prompts, tmp_path):
    output = tmp_path / "rows.jsonl"
    process = forked("--file", prompts, "--output", str(output), "--max-new-tokens", "20")
    wait_for(lambda: output.is_file() and output.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    err = (tmp_path / "log").read_text()
    assert "Traceback" not in err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert 0 < len(rows) < ROWS
    assert all(row["new_tokens"] == 20 for row in rows)
    assert f"{output}: {len(rows)} completion" in err
    assert f" of {ROWS}" in err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells by /proc what is being imported")
def test_ctrl_c_while_libraries_are_imported_is_quiet():
    with started("--prompt", "x") as process:
        wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "")


INTERRUPTED_AT_TYPER = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
from sparsetrain.cli import script
script()
"""


@pytest.mark.parametrize("command", [["recipe", "list"], ["run", "quickstart"]])
def test_ctrl_c_while_the_command_line_is_imported_is_quiet(command):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_AT_TYPER, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_has_read_enough_ends_it_quietly(forked, prompts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    process = forked("--file", prompts, "--max-new-tokens", "20", pipe=str(tmp_path / "pipe"))
    with (tmp_path / "pipe").open() as reader:
        assert json.loads(reader.readline())["new_tokens"] == 20
    assert process.wait() == 0
    err = (tmp_path / "log").read_text()
    assert "Traceback" not in err
    # It did not go on to the end.
    assert int(err.rsplit(" new tokens", 1)[0].rsplit(" ", 1)[1].replace(",", "")) < 20 * ROWS
