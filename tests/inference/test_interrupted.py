"""``sparsetrain generate`` as a process that is interrupted, or whose reader goes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "sparsetrain.cli", "generate", "sparsetrain:tiny"]
ROWS = 200


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


def wait_for(there, process):
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_ctrl_c_keeps_the_rows_that_are_done(prompts, tmp_path):
    output = tmp_path / "rows.jsonl"
    with started("--file", prompts, "--output", str(output), "--max-new-tokens", "20") as process:
        wait_for(lambda: output.is_file() and output.read_text(), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
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


def test_a_reader_that_has_read_enough_ends_it_quietly(prompts):
    with started("--file", prompts, "--max-new-tokens", "20") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["new_tokens"] == 20
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 0
    assert "Traceback" not in err
    # It did not go on to the end.
    assert int(err.rsplit(" new tokens", 1)[0].rsplit(" ", 1)[1].replace(",", "")) < 20 * ROWS
