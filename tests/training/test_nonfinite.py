"""A loss or gradient that is not finite: the documents are named, and the run stops or leaves the step out."""

from __future__ import annotations

import json

import pytest
import torch

from sparsetrain.cli import main
from sparsetrain.training.checkpoints import read_weights
from sparsetrain.training.distributed import build

POISONED = "model.layers.1.self_attn.q_proj.weight"

# One rank's gradient is poisoned: the others must decide alike.
SKIP_ON_TWO_RANKS = """
import os, sys
from sparsetrain.cli import main
from sparsetrain.training.distributed import build

initialize = build.initialize

def poisoned(module, *rest):
    engine = initialize(module, *rest)
    if os.environ["RANK"] == "1":
        weight = dict(engine.module.named_parameters())["model.model.layers.1.self_attn.q_proj.weight"]
        weight.register_hook(lambda gradient: gradient * (float("nan") if engine.global_steps == 1 else 1.0))
    return engine

build.initialize = poisoned
for stage in sys.argv[3:]:
    code = main(["run", sys.argv[1], f"deepspeed.stage={stage}", "train.steps=3", "train.on_nonfinite=skip",
                 "checkpoint.every=1", "checkpoint.keep_last=3", "--output", f"{sys.argv[2]}-{stage}"])
    if code:
        sys.exit(code)
"""


@pytest.fixture
def poison(monkeypatch):
    """Makes one gradient of the second step NaN."""
    initialize = build.initialize

    def poisoned(*arguments):
        engine = initialize(*arguments)
        weight = dict(engine.module.named_parameters())[f"model.{POISONED}"]
        weight.register_hook(lambda gradient: gradient * (float("nan") if engine.global_steps == 1 else 1.0))
        return engine

    monkeypatch.setattr(build, "initialize", poisoned)


def saved_weights(folder, step):
    """The weights of a checkpoint."""
    return read_weights(folder / f"checkpoints/step-{step:06d}")


def check_skipped(run):
    """The poisoned second step changed no weight, the third did, and the record names the documents."""
    assert run.values("skipped") == [0.0, 1.0, 0.0]
    assert all(loss > 0 for loss in run.values("loss"))
    first, second, third = (saved_weights(run.path, step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first[POISONED], third[POISONED])
    (record,) = map(json.loads, (run.path / "nonfinite.jsonl").read_text().splitlines())
    assert record["step"] == 2
    return record


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_skip_leaves_the_step_out_and_goes_on(tmp_path, tiny, run_folder, poison, stage):
    run = run_folder(tmp_path / "run")
    arguments = ["train.steps=3", "train.on_nonfinite=skip", "checkpoint.every=1", "checkpoint.keep_last=3"]
    assert main(["run", str(tiny), f"deepspeed.stage={stage}", *arguments, "--output", str(run.path)]) == 0
    record = check_skipped(run)
    (micro_batches,) = record["documents_by_rank"]
    assert len(micro_batches) == 4
    names = {name.rpartition(":")[0] for documents in micro_batches for name in documents}
    assert any("corpus.jsonl" in name for name in names)
    assert "passkey" in names


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stop_ends_the_run_before_the_step(tmp_path, tiny, run_folder, refused, poison, stage):
    run = run_folder(tmp_path / "run")
    error = refused(
        "run", str(tiny), f"deepspeed.stage={stage}", "checkpoint.every=1", "--output", str(run.path), code=3
    )
    assert "step 2" in error
    assert str(run.path / "nonfinite.jsonl") in error
    assert "train.on_nonfinite: skip" in error
    assert run.values("step") == [1]
    assert run.checkpoints == ["step-000001"]
    assert json.loads((run.path / "nonfinite.jsonl").read_text())["documents_by_rank"][0][0]


def test_ranks_skip_together_when_one_of_them_fails(tmp_path, tiny, ranks_of, run_folder):
    command = ["-c", SKIP_ON_TWO_RANKS, str(tiny), str(tmp_path / "run"), "0", "2"]
    ranks_of(command, tmp_path / "log", 2).wait()
    for stage in (0, 2):
        record = check_skipped(run_folder(tmp_path / f"run-{stage}"))
        assert [len(documents) for documents in record["documents_by_rank"]] == [2, 2]


def test_a_learning_rate_that_blows_up_stops_with_exit_code_3(tmp_path, tiny, run_folder, refused):
    run = run_folder(tmp_path / "run")
    overrides = ["train.lr=1000", "train.warmup=0", "train.optimizer.weight_decay=1000"]
    error = refused("run", str(tiny), *overrides, "--output", str(run.path), code=3)
    assert "with a gradient norm of inf" in error
    assert "Lower train.lr (1000.0)" in error
    assert json.loads((run.path / "nonfinite.jsonl").read_text())["step"] == len(run.steps) + 1
