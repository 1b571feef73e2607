"""The run through DeepSpeed's own launcher, two processes on gloo, and what all of them are told."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from ports import free_port

from sparsetrain.training.output.folder_contents import is_locked

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def launch(tiny, ranks_of):
    """``launch(folder, *arguments)``: ``deepspeed --num_gpus 2 launch/train.py`` on the tiny recipe."""

    def run(output, *arguments):
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
        launcher += ["--master_port", str(free_port()), str(REPOSITORY / "launch/train.py")]
        return ranks_of([*launcher, str(tiny), *arguments, "--output", str(output)], output.with_suffix(".log"), None)

    return run


def test_ctrl_c_under_the_launcher_saves_and_resume_ends_as_if_uninterrupted(
    tmp_path, monkeypatch, launch, start, stages, run_folder
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = run_folder(tmp_path / "run")
    ranks = launch(run.path, "deepspeed.stage=1")
    ranks.wait_until(lambda: len(run.steps) >= 1)
    # A terminal sends it to the launcher and to both ranks; the launcher then sends SIGTERM to the ranks.
    os.killpg(ranks.processes[0].pid, signal.SIGINT)
    ranks.processes[0].wait(300)
    ranks.wait_until(lambda: "continue with --resume" in ranks.log and not is_locked(run.path), alive=False)
    (checkpoint,) = run.checkpoints
    assert 1 <= run.state(checkpoint)["step"] < 6

    start(run.path, "deepspeed.stage=1", "--resume", ranks=2).wait()
    uninterrupted = stages(2)[1]
    assert run.values("loss") == uninterrupted.values("loss")
    assert all(torch.equal(run.weights[name], tensor) for name, tensor in uninterrupted.weights.items())


def test_a_mistake_ends_all_ranks_with_its_message(tmp_path, start):
    said = start(tmp_path / "run", "train.global_batch_sequences=3", ranks=2).wait(2)
    assert "is not a multiple of train.micro_batch=1 x 2 ranks" in said
    assert "Traceback" not in said


def test_a_signal_to_one_rank_stops_all_of_them_and_the_launch_exits_with_75(
    tmp_path, monkeypatch, launch, stages, run_folder
):
    """As Slurm, told --signal=USR1, or the owner of a spot machine would send it; the launcher is not told."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = run_folder(tmp_path / "run")
    ranks = launch(run.path, "deepspeed.stage=1", "checkpoint.every=1", "wandb.mode=offline")
    ranks.wait_until(lambda: len(run.steps) >= 1)
    # The launcher's own child. What that forks, for a moment or longer, has the same command line.
    launcher = psutil.Process(ranks.processes[0].pid)
    while "--local_rank=1" not in " ".join(" ".join(child.cmdline()) for child in launcher.children()):
        (launcher,) = launcher.children()
    (trainer,) = (child for child in launcher.children() if "--local_rank=1" in child.cmdline())
    trainer.send_signal(signal.SIGUSR1)
    said = ranks.wait(75)
    assert "continue with --resume" in said
    assert "Traceback" not in said
    assert "[transformers] Setting" not in said
    newest = run.checkpoints[-1]
    assert f"stopped at step {run.state(newest)['step']} of 6" in said
    assert run.values("loss") == stages(2)[1].values("loss")[: run.state(newest)["step"]]
