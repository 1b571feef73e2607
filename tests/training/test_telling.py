"""What only tells of a run stops nothing: console, metrics, W&B, report and pictures."""

from __future__ import annotations

import errno
import json
import sys
import types

import pytest

from sparsetrain.cli import main
from sparsetrain.training import run as training
from sparsetrain.training.output import pictures as drawing
from sparsetrain.training.output.tracking import Tracker


class Broken:
    """A stream of which every use fails."""

    encoding = "ascii"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        raise ValueError("I/O operation on closed file")

    def fileno(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space"), ValueError("closed")]
)
def test_a_run_that_nobody_hears_ends_as_any_other(tmp_path, tiny, run_folder, monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    run = run_folder(tmp_path / "run")
    assert main(["run", str(tiny), "train.steps=2", "--output", str(run.path)]) == 0
    assert run.values("step") == [1, 2]
    assert run.checkpoints == ["step-000002"]
    assert run.weights


def test_pictures_reports_metrics_and_wandb_that_fail_are_warnings(tmp_path, tiny, run_folder, monkeypatch, capfd):
    def fail(*_, **__):
        raise RuntimeError("no such font")

    def leave(*_, **__):
        sys.exit("W&B has had enough")

    monkeypatch.setattr(drawing, "loss_curve", fail)
    monkeypatch.setattr(drawing, "report_picture", leave)
    monkeypatch.setattr(training, "print_results", fail)
    settings = types.SimpleNamespace(mode="online", api_key="key", base_url="http://localhost")
    wandb = types.SimpleNamespace(
        init=leave,
        setup=lambda: types.SimpleNamespace(settings=settings),
        teardown=leave,
        Settings=types.SimpleNamespace(model_fields={}),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = run_folder(tmp_path / "run")
    # A folder in the way of a file refuses it as a full disk would.
    for name in ("metrics.jsonl", "deepspeed.json.part", "report.md.part"):
        (run.path / name).mkdir(parents=True)
    arguments = ["train.steps=2", "wandb.mode=online", "--output", str(run.path)]
    assert main(["run", str(tiny), *arguments]) == 0
    said = "".join(capfd.readouterr())
    assert f"warning: the picture loss.png in {run.path} cannot be written (RuntimeError: no such font)" in said
    assert f"warning: the picture report.png in {run.path} cannot be written (SystemExit: W&B has had enough)" in said
    assert f"warning: the report in {run.path} cannot be written" in said
    assert f"warning: the results in {run.path} cannot be written" in said
    assert f"warning: deepspeed.json in {run.path} cannot be written" in said
    assert f"warning: {run.path}/metrics.jsonl cannot be written (Is a directory)" in said
    assert "warning: W&B cannot be used" in said
    assert (run.path / "attention.png").is_file()
    assert run.checkpoints == ["step-000002"]
    assert run.weights


def test_metrics_begin_as_soon_as_they_can_be_written(tmp_path, tiny_recipe):
    (tmp_path / "metrics.jsonl").mkdir()
    said: list[str] = []
    tracker = Tracker(tiny_recipe(), tmp_path, rank=0, say=said.append)
    tracker.rewind(-1)
    tracker.log({"loss": 1.0}, 1)
    assert set(said) == {f"warning: {tmp_path}/metrics.jsonl cannot be written (Is a directory)"}
    (tmp_path / "metrics.jsonl").rmdir()
    tracker.log({"loss": 1.0}, 2)
    tracker.finish()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 2, "loss": 1.0}
