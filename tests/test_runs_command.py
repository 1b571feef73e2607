"""``sparsetrain runs``, ``logs`` and what a shell completes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from made_runs import make_run, record

from sparsetrain.cli import main

A_RUN = """
import fcntl, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
with (folder / ".lock").open("wb+") as lock, (folder / "run.log").open("a") as log:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.readline()
    print("2026-11-30 12:00:02 step 2/2", file=log)
"""


@pytest.fixture
def running(tmp_path):
    """A run whose process goes on until it gets a line, and then writes its last one."""
    folder = make_run(tmp_path / "runs/going", steps=30)
    (folder / "run.log").write_text("2026-11-30 12:00:00 batch: ...\n2026-11-30 12:00:01 step 1/2\n")
    command = [sys.executable, "-c", A_RUN, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield folder, process
        process.stdin.close()


def told(capsys):
    return [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_runs_are_listed_with_their_state(running, tmp_path, capsys):
    folder, _ = running
    stopped = make_run(tmp_path / "runs/sub/stopped", steps=12)
    finished = make_run(tmp_path / "runs/finished")
    record(finished, 60, finished=1.0, planned_steps=60)
    early = make_run(tmp_path / "runs/early", "checkpoint.export=false", steps=30)
    record(early, 33, finished=1.0, planned_steps=60)
    of_tokens = make_run(tmp_path / "runs/tokens", "train.steps=null", "train.tokens=320000", steps=40)
    record(of_tokens, 0, planned_steps=40)
    of_epochs = make_run(tmp_path / "runs/epochs", "train.steps=null", "train.epochs=2", "data.sources=[{path: a.txt}]")
    (of_epochs / "metrics.jsonl").unlink()
    continued = make_run(tmp_path / "runs/continued", "train.steps=80")
    (continued / "final").mkdir()  # of its first 60 steps
    damaged = make_run(tmp_path / "runs/damaged")
    (damaged / "recipe.yaml").write_text("{")
    checkpoint = finished / "checkpoints/step-000060"
    checkpoint.mkdir(parents=True)
    shutil.copy(finished / "recipe.yaml", checkpoint)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    header, *rows = told(capsys)
    assert header == ["run", "state", "step", "loss", "size", "last written"]
    states = {row[0]: row[1:3] for row in rows}
    assert states == {
        str(folder): ["running", "30/60"],
        str(stopped): ["stopped", "12/60"],
        str(finished): ["finished", "60/60"],
        str(early): ["finished (early stopping)", "33/60"],
        str(of_tokens): ["stopped", "40/40"],
        str(of_epochs): ["stopped", "0/2 epochs"],
        str(continued): ["stopped", "60/80"],
        str(damaged): ["damaged", "60/?"],
    }
    assert main(["runs", str(finished)]) == 0
    assert [row[0] for row in told(capsys)] == ["run", str(finished)]
    assert all(re.fullmatch(r"\d\.\d{4}|-", row[3]) and re.fullmatch(r"[\d.]+ (B|KiB|MiB)", row[4]) for row in rows)


def test_a_log_is_followed_until_the_run_ends(running, capsys):
    folder, process = running
    assert main(["logs", str(folder), "--lines", "1"]) == 0
    assert capsys.readouterr().out == "2026-11-30 12:00:01 step 1/2\n"
    command = [sys.executable, "-m", "sparsetrain.cli", "logs", str(folder), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert "batch: ..." in following.stdout.readline()
        assert "step 1/2" in following.stdout.readline()
        process.communicate("end\n")
        assert "step 2/2" in following.stdout.readline()
        assert following.wait() == 0


def test_what_has_no_runs_or_no_log_is_told(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert f"{tmp_path} holds no runs" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert f"there is no folder {tmp_path}/none" in capsys.readouterr().err
    assert main(["logs", str(tmp_path)]) == 2
    assert "it is not a run folder; give the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sparsetrain lo", {"logs"}),
        ("sparsetrain recipe show quick", {"quickstart"}),
        ("sparsetrain run my", {"my.yaml", "myruns/"}),
        ("sparsetrain run my.yaml train.lr", {"train.lr="}),
        ("sparsetrain run my.yaml eval.at_", {"eval.at_start=", "eval.at_end="}),
        ("sparsetrain eval myruns/", {"myruns/a"}),
        ("sparsetrain run quickstart --ou", {"--output"}),
    ],
)
def test_a_shell_completes_commands_recipes_runs_and_settings(tmp_path, monkeypatch, capsys, typed, offered):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").touch()
    for name in ("a/recipe.yaml", "other/file"):
        (tmp_path / "myruns" / name).parent.mkdir(parents=True)
        (tmp_path / "myruns" / name).touch()
    monkeypatch.setenv("_SPARSETRAIN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert main([]) == 0
    found = set(capsys.readouterr().out.split())
    assert found >= offered
    assert all(word.startswith(typed.split()[-1]) for word in found)
