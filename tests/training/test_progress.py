from __future__ import annotations

import io
import os
import pty
import re
from contextlib import ExitStack

import pytest

from sparsetrain.activity import activity
from sparsetrain.training.job import Job
from sparsetrain.training.output.progress import Progress


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Progress(100, 11, 4096, file=out) as progress:
        progress.update(12, loss=3.2141, lr=2e-4, grad_norm=0.714)
        progress.log("evaluating [at step 12]")
        progress.update(13, loss=3.1, lr=2e-4)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d step 12/100  loss 3\.214  lr 2\.0e-04  grad 0\.71  [\d,]+ tok/s  left \d+:\d\d(:\d\d)?",
        lines[0],
    )
    assert lines[1][8:] == " evaluating [at step 12]"
    assert re.fullmatch(r"\S+ step 13/100  loss 3\.100  lr 2\.0e-04  [\d,]+ tok/s  left .*", lines[2])


def test_every_line_is_kept_in_a_file_with_its_date_and_the_error_at_the_end(tmp_path):
    file = tmp_path / "run.log"

    def run() -> None:
        with ExitStack() as cleanup:
            progress = Progress(10, 0, 1, file=io.StringIO())
            progress.keep(file, cleanup)
            progress.log("batch: 1")
            progress.update(1, loss=2.0, lr=1e-3)
            raise ValueError("rank 1 is lost")

    with pytest.raises(ValueError, match="lost"):
        run()
    said = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line)[1] for line in file.read_text().splitlines()]
    assert said[0] == "batch: 1"
    assert said[1].startswith("step 1/10  loss 2.000")
    assert said[2:] == ["error: rank 1 is lost"]


def test_a_log_that_cannot_be_written_is_told_once_and_left_out(tmp_path):
    out = io.StringIO()
    with ExitStack() as cleanup:
        progress = Progress(10, 0, 1, file=out)
        progress.keep(tmp_path, cleanup)
        progress.log("on")
    assert f"warning: {tmp_path} cannot be written (Is a directory)" in out.getvalue()
    assert out.getvalue().endswith(" on\n")


def test_long_lines_are_not_broken():
    out = io.StringIO()
    with Progress(10, 0, 1, file=out) as progress:
        progress.log("x" * 500)
    assert out.getvalue()[9:] == "x" * 500 + "\n"


def read_all(descriptor: int) -> str:
    """What was written to a terminal that is closed by now."""
    shown = b""
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:  # how Linux says that nobody writes any more
            part = b""
        if not part:
            os.close(descriptor)
            return shown.decode()
        shown += part


def test_a_bar_on_a_terminal_with_text_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, Progress(10, 2, 1024, file=terminal) as progress:
        progress.update(3, loss=1.5, lr=1e-3, grad_norm=0.5)
        progress.log("saved step-000003")
    shown = read_all(reader)
    assert "saved step-000003" in shown
    assert shown.rindex("step 3/10") > shown.index("saved step-000003"), "the bar is drawn again below the text"
    assert "loss 1.500  lr 1.0e-03  grad 0.50" in shown
    assert "━" in shown


def test_other_ranks_are_silent():
    out = io.StringIO()
    with Progress(10, 0, 1024, rank=1, file=out) as progress:
        progress.update(1, loss=1.5, lr=1e-3)
        progress.log("text")
        assert progress.tokens_per_second > 0
    assert out.getvalue() == ""


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sparsetrain.training.output.progress.time.monotonic", lambda: now[0])
    return now


def test_speed_and_time_left_leave_out_evaluations(clock):
    progress = Progress(20, 10, 1000, file=io.StringIO())
    assert progress.tokens_per_second == 0
    with progress:
        for step in (11, 12):
            clock[0] += 2.0
            progress.update(step, loss=1.0, lr=1e-3)
        clock[0] += 600.0
        progress.restart_clock()
        clock[0] += 2.0
        progress.update(13, loss=1.0, lr=1e-3)
    assert progress.tokens_per_second == 500
    assert progress.seconds_left == 14


def test_steps_between_updates_and_uneven_steps_are_counted(clock):
    with Progress(100, 0, 1000, file=io.StringIO()) as progress:
        clock[0] += 5.0
        progress.update(5, loss=1.0, lr=1e-3)
        assert progress.tokens_per_second == 1000
        clock[0] += 5.0
        progress.update(10, loss=1.0, lr=1e-3, tokens=2000)
        assert progress.tokens_per_second == 700
        assert progress.seconds_left == 90


def test_counted_work_is_a_bar_of_its_own_on_a_terminal_and_a_line_elsewhere(monkeypatch):
    out = io.StringIO()
    with Progress(10, 0, 1, file=out).counting("evaluating: power") as on_progress:
        on_progress(1, 4)
    assert out.getvalue()[8:] == " evaluating: power\n"

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, terminal = pty.openpty()
    with open(terminal, "w", encoding="utf-8") as file:
        with Progress(10, 0, 1, file=file).counting("evaluating: power") as on_progress:
            on_progress(3, 4)
        file.flush()
    shown = read_all(master)
    assert "3 of 4" in shown
    # The bar is gone at the end; the line stays.
    assert shown.rstrip().endswith("evaluating: power")


@pytest.mark.parametrize("fails", [False, True])
def test_each_file_that_rank_0_writes_while_others_wait_is_progress(tmp_path, fails):
    def write():
        if fails:
            raise OSError("no space left")

    job = Job(recipe=None, output=tmp_path, world=None, signals=None, progress=Progress(1, 0, 1, file=io.StringIO()))
    before = activity.moves
    assert job.record("the picture loss.png", write) is not fails
    assert activity.moves > before
