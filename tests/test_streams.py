"""Standard output and standard error that cannot be written, and what becomes of the commands that print there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain.streams import forgiving

COMMAND = [sys.executable, "-m", "sparsetrain.cli"]
FULL = Path("/dev/full")

# In a process of its own, as the files behind numbers 1 and 2 are changed.
PRINTS = """
import sys
from sparsetrain.streams import forgiving
with forgiving() as streams:
    for _ in range(1000):
        print("a line of {letter}", flush=True)
        print("and one of {letter}", file=sys.stderr)
    assert not sys.stdout.isatty()
open({out!r}, "w").write(f"{{streams.out.fault!r}} {{streams.err.fault!r}}")
"""


def printed(tmp_path, letter="text", environment=None, **streams):
    """The faults of both streams where they are as given; the process must end well."""
    out = tmp_path / "faults"
    code = PRINTS.format(out=str(out), letter=ascii(letter)[1:-1])
    given = {**os.environ, **(environment or {})}
    assert subprocess.run([sys.executable, "-c", code], env=given, **streams).returncode == 0
    return out.read_text()


def test_nothing_that_is_lost_where_all_is_well(tmp_path):
    assert printed(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == "None None"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_raises_nothing(tmp_path):
    with FULL.open("w") as full:
        assert printed(tmp_path, stdout=full, stderr=full).count("No space left on device") == 2


def test_a_reader_that_has_gone_raises_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    assert printed(tmp_path, stdout=writer, stderr=writer).count("BrokenPipeError") == 2
    os.close(writer)


def test_letters_that_the_encoding_lacks_are_written_in_escapes(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        faults = printed(tmp_path, "\u20ac", {"PYTHONIOENCODING": "ascii:strict"}, stdout=file, stderr=file)
    assert faults.count("UnicodeEncodeError") == 1, "standard error has its own way with them"
    assert log.read_text().count("a line of \\u20ac\n") == log.read_text().count("and one of \\u20ac\n") == 1000


def test_files_opened_later_do_not_take_the_place_of_closed_streams(tmp_path):
    """They would get what libraries print."""
    code = f"""
from sparsetrain.streams import forgiving
with forgiving():
    file = open({str(tmp_path / "file")!r}, "w")
    assert file.fileno() > 2
    print("nothing")
"""
    closed = "import os, sys; [os.close(n) for n in (0, 1, 2)]; os.execv(sys.executable, [sys.executable, '-c', {!r}])"
    assert subprocess.run([sys.executable, "-c", closed.format(code)]).returncode == 0


def test_the_streams_of_before_are_back_afterwards():
    before = sys.stdout, sys.stderr
    with forgiving():
        assert (sys.stdout, sys.stderr) != before
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_command_whose_output_is_lost_says_so():
    with FULL.open("w") as full:
        done = subprocess.run([*COMMAND, "recipe", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written: [Errno 28] No space left on device\n"


def test_a_reader_that_has_read_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "recipe", "list"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_whose_output_was_closed_says_so():
    """As by ``>&-`` in a shell."""
    command = ["sh", "-c", '"$@" <&- >&-', "sh", *COMMAND]
    done = subprocess.run([*command, "recipe", "list"], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "standard output cannot be written: [Errno 9] it was closed before the start" in done.stderr
    done = subprocess.run([*command, "generate", "x", "--file", "-"], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True)
