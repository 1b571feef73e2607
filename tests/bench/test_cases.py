"""A benchmark is one file: its options are the command line, and its name is the command's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsetrain.bench import cases
from sparsetrain.cli import main

CASE = '''
from typing import Annotated

from sparsetrain.bench.options import Count, Options as AnyOptions, Suits, one_of


class Options(AnyOptions):
    """Time how long it takes to count."""

    upto: Annotated[Count, Suits(1000, 10)]
    """The last number."""
    order: Annotated[str, one_of("up", "down")] = "up"
    """up or down."""
    aloud: bool = True
    """Say them."""


def run(options: Options) -> None:
    print(options.upto, options.order, options.aloud, options.output)
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
    assert "The last number; by default 1000, and 10" in shown
    assert "--no-aloud" in shown
    assert main(["bench", "counting"]) == 0
    assert capsys.readouterr().out == "10 up True None\n"
    assert main(["bench", "counting", "--upto", "3", "--order", "down", "--no-aloud", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"3 down False {tmp_path}\n"


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--order", "around"], "--order around is not known; choose one of up, down"),
        (["--upto", "0"], "Invalid value for '--upto'"),
        (["--output", __file__], "is a file; name a folder"),
    ],
)
def test_what_its_options_do_not_allow_is_refused(arguments, message, capsys):
    assert main(["bench", "counting", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
