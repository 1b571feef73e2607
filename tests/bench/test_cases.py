"""A benchmark is one file: its options are the command line, and its name is the command's."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest

from sparsetrain.bench import cases
from sparsetrain.bench.cases import step
from sparsetrain.bench.cli import command
from sparsetrain.cli import main

CASE = '''
from dataclasses import dataclass
from typing import Annotated

from rich.text import Text

from sparsetrain.bench.case import Case
from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.measure import Unavailable
from sparsetrain.bench.options import Count, Lengths, Options as AnyOptions, Suits, one_of
from sparsetrain.bench.table import Row, column


class Options(AnyOptions):
    """Time how long it takes to count."""

    lengths: Annotated[Lengths, Suits("1000,2000", "10,20")]
    """The last numbers."""
    step: Annotated[Count, Suits(7, 3)]
    """Numbers passed over."""
    order: Annotated[str, one_of("up", "down")] = "up"
    """up or down."""
    aloud: bool = True
    """Say them."""
    budget: float = 1


@dataclass(kw_only=True)
class CountingRow(Row):
    ms: float | None = column("ms")
    counted: int | None = column("counted")

    def ends(self):
        return {"who": Text(self.name)}, {"": Text(self.reason)}


@dataclass(frozen=True)
class Counting(Case):
    not_counted = "fingers"

    def row(self, contender, length):
        return CountingRow(length=length, name=contender.name)

    def inputs(self, length, report, log):
        return range(0, length, self.options.step)

    def measure(self, contender, numbers, row, report):
        prepared = contender.prepare(self.options, numbers)
        row.counted = len(list(numbers))
        row.ms = self.time(lambda: prepared.attend(numbers))


def asleep(options, numbers):
    raise Unavailable("asleep")


def case(options):
    known = (
        Contender("python", "Python", "all", lambda *_: Prepared(list), ("cpu",)),
        Contender("sheep", "sheep", "all", asleep, ("cpu",)),
        Contender("gpu", "a GPU", "all", asleep),
    )
    return Counting("counting", options, known[:2], known, "counting")
'''


@pytest.fixture
def counting(tmp_path: Path, monkeypatch):
    (tmp_path / "counting.py").write_text(CASE)
    monkeypatch.setattr(cases, "__path__", [*cases.__path__, str(tmp_path)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    yield
    sys.modules.pop("sparsetrain.bench.cases.counting", None)


@pytest.mark.usefixtures("counting")
def test_a_new_file_is_a_command(capsys, tmp_path):
    assert main(["bench", "--help"]) == 0
    assert "Time how long it takes to count." in capsys.readouterr().out
    assert "sparsetrain.bench.cases.counting" not in sys.modules, "a list of commands imports none"
    assert main(["bench", "counting", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Numbers passed over; by default 7, and 3 without a GPU." in shown
    assert "--no-aloud" in shown
    arguments = ["--lengths", "30,60", "--order", "down", "--no-aloud", "--output", str(tmp_path / "out")]
    assert main(["bench", "counting", *arguments]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].endswith("Not measured here: gpu, fingers.")
    assert "60 tokens" in lines
    assert "who ms counted" in lines
    assert "sheep: asleep" in lines
    record = json.loads((tmp_path / "out/counting.json").read_text())
    assert [(row["length"], row["name"], row["counted"]) for row in record["rows"]] == [
        (30, "python", 10),
        (30, "sheep", None),
        (60, "python", 20),
        (60, "sheep", None),
    ]
    wanted = {"order": "down", "aloud": False, "step": 3, "lengths": [30, 60], "opponents": ["python", "sheep"]}
    assert wanted.items() <= record["options"].items()


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--order", "around"], "--order around is not known; choose one of up, down"),
        (["--step", "0"], "Invalid value for '--step'"),
        (["--output", __file__], "is a file; name a folder"),
        (["--output", "/proc/new/er"], "--output /proc/new/er: nothing can be written in /proc (No such file or"),
        (["--output", f"{__file__}/new"], "test_cases.py (Not a directory); name another folder"),
    ],
)
def test_what_its_options_do_not_allow_is_refused(arguments, message, capsys):
    assert main(["bench", "counting", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_argument_that_is_a_list_has_no_default_which_click_8_1_refuses():
    assert inspect.signature(command(step)).parameters["overrides"].default is None
