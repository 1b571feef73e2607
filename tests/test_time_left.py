"""Counted work says how far it is and how long it takes, also where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparsetrain import time_left
from sparsetrain.time_left import clock_time, counting


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, to be set."""
    seconds = [0.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: seconds[0])
    return seconds


def test_off_a_terminal_there_is_a_line_every_few_seconds(clock):
    file = io.StringIO()
    with counting("dense", Console(file=file)) as count:
        # 100 were done before.
        for step in range(20):
            clock[0] = 3.0 * step
            count(100 + step, 120)
    assert [line[9:] for line in file.getvalue().splitlines()] == [
        "dense: 104 of 120, 0:48 left",
        "dense: 108 of 120, 0:36 left",
        "dense: 112 of 120, 0:24 left",
        "dense: 116 of 120, 0:12 left",
    ]


def test_short_work_has_no_line(clock):
    file = io.StringIO()
    with counting("dense", Console(file=file)) as count:
        count(1, 2)
        count(2, 2)
    assert file.getvalue() == ""


def test_on_a_terminal_there_is_a_bar(clock):
    file = io.StringIO()
    with counting("trained [power]", Console(file=file, force_terminal=True, width=80)) as count:
        count(0, 4)
        clock[0] = 130.0
        count(2, 4)
    assert "trained [power]" in file.getvalue()
    assert "2 of 4, 2:10 left" in file.getvalue()


def test_hours_are_told_where_there_are_any():
    said = [clock_time(seconds) for seconds in (0, 42.4, 61, 3599.6, 36610)]
    assert said == ["0:00", "0:42", "1:01", "1:00:00", "10:10:10"]
