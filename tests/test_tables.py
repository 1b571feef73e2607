"""Tables in a pipe or a file, and on a narrow terminal: nothing is cut."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from rich.table import Table

from sparsetrain.cli import main
from sparsetrain.doctor import diagnosis
from sparsetrain.evaluation.report import print_results
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.tasks.passkey import PasskeyResult
from sparsetrain.evaluation.tasks.perplexity import PerplexityResult
from sparsetrain.tables import print_tables, print_text

LENGTHS = [1024 << index for index in range(8)]


def _eval() -> None:
    passkey = PasskeyResult(lengths=LENGTHS, depths=[0.0], trials=1, digits=5, correct=[[1] for _ in LENGTHS])
    perplexity = PerplexityResult(perplexity=dict.fromkeys(LENGTHS, 2.345), tokens=4096)
    print_results({"before": EvalResult(tasks={"perplexity": perplexity, "passkey": passkey})})


def _doctor() -> None:
    diagnosis.diagnose()


def _plan() -> None:
    assert main(["plan", "qwen3-8b-power-128k", "--gpus", "8"]) == 0


def _bench() -> None:
    small = ["--lengths", "96", "--heads", "2", "--head-dim", "8", "--block", "16", "--budget", "1"]
    assert main(["bench", "power", *small]) == 0


@pytest.mark.parametrize("command", [_eval, _doctor, _plan, _bench])
def test_what_is_not_a_terminal_gets_whole_rows(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = "a sentence of a check that is " + "very " * 30 + "long"
    monkeypatch.setattr(diagnosis, "run_checks", lambda *_: [diagnosis.Finding("ok", "check", found)])
    command()
    shown = capsys.readouterr().out
    assert "…" not in shown
    lines = {
        "_eval": "before " + "  2.345" * 8,
        "_doctor": f"ok check {found}",
        "_plan": "attention s/step tokens/s products attention elementwise waiting update",
        "_bench": "fwd ms fwd+bwd ms bwd ms TFLOP/s fwd TFLOP/s bwd x fwd x fwd+bwd check",
    }
    wanted = " ".join(lines[command.__name__].split())
    assert any(wanted in " ".join(line.split()) for line in shown.splitlines()), shown


def test_a_narrow_terminal_breaks_rows_and_cuts_nothing():
    stream = io.StringIO()
    table = Table(box=None)
    for index in range(6):
        table.add_column(f"column {index}", no_wrap=True)
    table.add_row(*["0.00234"] * 6)
    print_tables(Console(file=stream, width=20, force_terminal=True, color_system=None), table)
    assert "…" not in stream.getvalue()
    assert stream.getvalue().count("0.00234") == 6


def test_texts_are_broken_between_words_on_a_terminal_alone():
    text = "- " + "words of a note " * 10 + "deepspeed.offload_optimizer=cpu,train.global_batch_sequences=8"
    shown = [io.StringIO(), io.StringIO()]
    for file, terminal in zip(shown, (True, False), strict=True):
        print_text(Console(file=file, width=40, force_terminal=terminal), text, indent=2)
    lines = shown[0].getvalue().splitlines()
    assert " ".join(line.strip() for line in lines) == text
    assert all(len(line) <= 40 for line in lines[:-1])
    assert all(line.startswith("  ") for line in lines[1:])
    assert shown[1].getvalue() == text + "\n"
