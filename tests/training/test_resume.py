"""A run that was interrupted and resumed ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import pytest
import torch

from sparsetrain.cli import main


@pytest.fixture
def same_end():
    """``same_end(run, uninterrupted)``: equal losses, norms and weights, and every step recorded once."""

    def compare(run, uninterrupted):
        assert run.values("step") == [1, 2, 3, 4, 5, 6]
        recorded = [(line["step"], tuple(line)) for line in run.lines]
        assert len(set(recorded)) == len(recorded)
        assert [step for step, _ in recorded] == sorted(step for step, _ in recorded)
        for name in ("loss", "grad_norm", "lr", "tokens"):
            assert run.values(name) == uninterrupted.values(name), name
        weights = run.weights
        assert all(torch.equal(weights[name], tensor) for name, tensor in uninterrupted.weights.items())

    return compare


def test_killed_at_a_random_moment(tmp_path, tiny, start, stages, run_folder, same_end, capfd):
    moment = random.SystemRandom().uniform(2.0, 5.9)
    print(f"killed {moment % 1:.2f} of a step after step {int(moment)}")
    run = run_folder(tmp_path / "run")
    arguments = ["checkpoint.every=2", "checkpoint.keep_last=1", "wandb.mode=offline"]
    ranks = start(run.path, *arguments)
    ranks.wait_until(lambda: len(run.steps) >= int(moment))
    time.sleep(moment % 1 * run.steps[-1]["step_seconds"])
    ranks.signal(signal.SIGKILL)
    ranks.wait(-signal.SIGKILL)

    newest = [name for name in run.checkpoints if name.endswith(("2", "4", "6"))]
    first_id = run.state(newest[-1])["wandb_run_id"] if newest else None
    assert main(["run", str(tiny), *arguments, "--output", str(run.path), "--resume"]) == 0
    said = capfd.readouterr()
    assert ("resumed" in said.out + said.err) == bool(newest)
    same_end(run, stages(1)[2])
    assert run.checkpoints == ["step-000006"]
    last_id = run.state("step-000006")["wandb_run_id"]
    assert last_id
    assert first_id in (last_id, None)
    assert list((run.path / "wandb").glob(f"offline-run-*-{last_id}"))


def test_a_torn_checkpoint_is_passed_over_by_all_ranks(tmp_path, start, stages, run_folder, same_end):
    run = run_folder(tmp_path / "run")
    arguments = ["deepspeed.stage=3", "checkpoint.every=1"]
    ranks = start(run.path, *arguments, "checkpoint.keep_last=6", ranks=2)
    ranks.wait_until(lambda: "step-000004" in run.checkpoints)
    ranks.signal(signal.SIGKILL)
    ranks.wait(-signal.SIGKILL)

    # As a crash in the middle of a save, and a disk that lost the end of a file, would leave the folder.
    checkpoints = run.path / "checkpoints"
    for name in run.checkpoints:
        if name > "step-000004":
            (checkpoints / name).rename(tmp_path / name)
    shard = checkpoints / "step-000004/rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    (checkpoints / "step-000003" / "manifest.json").unlink()
    (checkpoints / "step-000099.tmp").mkdir()
    (checkpoints / "step-000099.tmp/rank-00000.safetensors").write_bytes(b"half")
    # As a crash in the middle of deleting an old checkpoint would.
    (checkpoints / "step-000001").mkdir(exist_ok=True)
    (checkpoints / "step-000001" / "manifest.json").unlink(missing_ok=True)

    said = start(run.path, *arguments, "checkpoint.keep_last=3", "--resume", ranks=2).wait()
    assert f"skipping step-000004: {shard.name} has" in said
    assert "skipping step-000003: no readable manifest" in said
    assert "at step 2" in said
    same_end(run, stages(2)[3])
    assert run.checkpoints == ["step-000004", "step-000005", "step-000006"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 0)], ids=["TERM", "USR1", "INT"]
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, tiny, start, stages, run_folder, same_end, number, code):
    run = run_folder(tmp_path / "run")
    ranks = start(run.path)
    ranks.wait_until(lambda: len(run.steps) >= 1)
    ranks.signal(number)
    if number == signal.SIGTERM:
        # A scheduler tells the process, and so does the launcher that was told as well.
        ranks.signal(number)
    said = ranks.wait(code)
    (checkpoint,) = run.checkpoints
    step = run.state(checkpoint)["step"]
    assert 1 <= step < 6
    assert f"stopped at step {step} of 6; continue with --resume" in said
    assert "Traceback" not in said
    assert not (run.path / "final").exists()
    assert main(["run", str(tiny), "--output", str(run.path), "--resume"]) == 0
    same_end(run, stages(1)[2])


def test_killed_before_the_first_checkpoint_it_starts_again(tmp_path, tiny, start, stages, run_folder, same_end, capfd):
    run = run_folder(tmp_path / "run")
    ranks = start(run.path)
    ranks.wait_until(lambda: len(run.steps) >= 1)
    ranks.signal(signal.SIGKILL)
    ranks.wait(-signal.SIGKILL)
    assert main(["run", str(tiny), "--output", str(run.path), "--resume"]) == 0
    assert f"nothing to resume in {run.path}" in "".join(capfd.readouterr())
    same_end(run, stages(1)[2])


def test_resuming_a_finished_run_changes_nothing(tmp_path, tiny, stages, run_folder, same_end):
    run = run_folder(tmp_path / "run")
    shutil.copytree(stages(1)[2].path, run.path)
    assert main(["run", str(tiny), "--output", str(run.path), "--resume"]) == 0
    assert run.lines == stages(1)[2].lines
    same_end(run, stages(1)[2])


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (2, "float32")]
    + [(stage, "bfloat16") for stage in (0, 2, 3)]
    + [(stage, "float16") for stage in (0, 2, 3)],
)
def test_every_stage_and_dtype_resumes_with_dropout(tmp_path, tiny, tiny_recipe, run_folder, monkeypatch, stage, dtype):
    """Dropout draws from the random state that the checkpoint keeps; 16-bit weights have fp32 masters there.

    The loss scale of fp16 is doubled every other step, and begins where the first steps overflow.
    """
    whole, resumed = run_folder(tmp_path / "whole"), run_folder(tmp_path / "resumed")
    # Another family begins anew, so that the sizes are said again.
    architecture = tiny_recipe().model.architecture | {"model_type": "phi3", "pad_token_id": 0, "resid_pdrop": 0.2}
    overrides = [f"model.architecture={json.dumps(architecture)}", f"model.dtype={dtype}"]
    overrides += [f"deepspeed.stage={stage}", "train.steps=4", "checkpoint.every=2"]
    if dtype == "float16":
        # It is refused on every CPU, which is slow at it but able.
        from deepspeed.accelerator import get_accelerator

        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
        monkeypatch.setattr("sparsetrain.training.preflight.check_config", lambda _: None)
        scale = "{initial_scale_power: 13, loss_scale_window: 2, hysteresis: 1}"
        overrides += [f"deepspeed.config={{fp16: {scale}}}", "train.on_nonfinite=skip"]
    assert main(["run", str(tiny), *overrides, "--output", str(whole.path)]) == 0
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.path / "checkpoints/step-000004")
    shutil.rmtree(resumed.path / "final")
    assert main(["run", str(tiny), *overrides, "--output", str(resumed.path), "--resume"]) == 0
    assert resumed.values("loss") == whole.values("loss")
    assert resumed.values("grad_norm") == whole.values("grad_norm")
    assert len(set(resumed.values("loss"))) == 4
    scales = [run.state("step-000004")["loss_scale"] for run in (whole, resumed)]
    assert scales[0] == scales[1]
    assert (scales[0].get("cur_scale", 1.0) != whole.state("step-000002")["loss_scale"].get("cur_scale", 1.0)) == (
        dtype == "float16"
    )
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())
