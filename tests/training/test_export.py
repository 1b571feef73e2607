"""A trained model is written whole or not at all."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

import sparsetrain
from sparsetrain.cli import main

BLOCK = 4096


@pytest.fixture
def finished(tmp_path, stages):
    """A copy of a finished run of every parameter."""
    return shutil.copytree(stages(1)[2].path, tmp_path / "finished")


def kib(folder):
    """What a folder takes of a disk that gives files whole blocks."""
    return sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in folder.rglob("*") if file.is_file()) // 1024


def test_a_model_that_finds_no_room_at_the_end_leaves_no_final_folder(tiny, stages, refused, small_disk, tmp_path):
    made = stages(1)[2].path
    disk = small_disk(kib(made / "checkpoints/step-000006") + kib(made / "final") * 3 // 4)
    error = refused("run", str(tiny), "--output", str(disk / "run"))
    assert f"cannot write the model to {disk}/run/final: " in error
    assert "No space left" in error
    assert "--resume" in error
    assert not list((disk / "run").glob("final*"))
    assert "continue it with --resume" in refused("export", str(disk / "run"), str(tmp_path / "out"))

    shutil.copytree(disk / "run", tmp_path / "run")
    assert main(["run", str(tiny), "--output", str(tmp_path / "run"), "--resume"]) == 0
    ours, theirs = (load_file(run / "final/model.safetensors") for run in (tmp_path / "run", made))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_a_resumed_run_replaces_what_an_interrupted_export_left(tiny, finished):
    shutil.move(finished / "final", finished / "final.tmp")
    (finished / "final.tmp/model-00001-of-00002.safetensors").write_bytes(b"torn")
    (finished / "final").mkdir()
    (finished / "final/of-before").touch()
    assert main(["run", str(tiny), "--output", str(finished), "--resume"]) == 0
    assert [path.name for path in finished.glob("final*")] == ["final"]
    assert not (finished / "final/of-before").exists()
    assert not list((finished / "final").glob("*-of-*"))
    sparsetrain.load(finished / "final")
