"""Files of a run folder that are pipes, links or nested without end: nothing waits for them, or writes through them."""

import os
from contextlib import ExitStack

import pytest

from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.pictures import loss_curve
from sparsetrain.evaluation.report import read_results
from sparsetrain.recipe import load_recipe
from sparsetrain.training.changes import read_history
from sparsetrain.training.output import run_folder
from sparsetrain.training.output.model_card import _versions
from sparsetrain.training.output.tracking import Tracker, _step_of


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("evaluation.json", "history.json", "environment.json", "metrics.jsonl", ".lock"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        read_results(tmp_path)
    assert read_history(tmp_path) == []
    assert "versions that are not known" in _versions(tmp_path)
    with ExitStack() as cleanup:
        run_folder._lock_folder(tmp_path, cleanup)
    said = []
    recipe = load_recipe("tiny-sparsek", ["wandb.mode=disabled"]).recipe
    tracker = Tracker(recipe, tmp_path, rank=0, resume_id=None, say=said.append, remake=lambda: None)
    tracker.rewind(-1)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert "metrics.jsonl cannot be written" in said[0]
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not a file"):
        loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_a_picture_takes_the_place_of_a_pipe_or_a_link(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    (tmp_path / "precious").write_text("kept")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "precious")
    for name in ("pipe.png", "link.png"):
        assert loss_curve(tmp_path / "metrics.jsonl", tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lock_that_is_a_link_empties_nothing(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with ExitStack() as cleanup:
        run_folder._lock_folder(tmp_path, cleanup)
    assert (tmp_path / "precious").read_text() == "kept"


def test_records_nested_without_end_are_damaged(tmp_path):
    (tmp_path / "history.json").write_text("[" * 200_000)
    assert read_history(tmp_path) == []
    assert _step_of("[" * 200_000) == float("inf")
