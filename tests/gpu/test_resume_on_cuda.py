"""Killed and resumed on a CUDA device, a run ends as if nothing had happened: bit for bit, dropout included."""

from __future__ import annotations

import json
import shutil
import signal
import sys

import pytest
import torch

from sparsetrain.cli import main
from sparsetrain.recipe import load_recipe
from sparsetrain.training.checkpoints import read_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPARSEK = "attention={method: sparsek, topk: 64, window: 64, sinks: 4}"
LORA = "lora={rank: 4, targets: linear, dropout: 0.2}"
# Of "full" ones all of the model is trained, in the one architecture with dropout between its layers.
DROPOUT = {"model_type": "phi3", "pad_token_id": 0, "resid_pdrop": 0.2}
CASES = {
    "lora-stage-0": [LORA, "train.lr=0.05", "deepspeed.stage=0"],
    "lora-stage-2": [LORA, "train.lr=0.05", "deepspeed.stage=2", SPARSEK],
    "lora-stage-3": [LORA, "train.lr=0.05", "deepspeed.stage=3"],
    "full-stage-0": ["deepspeed.stage=0"],
    "full-stage-3": ["deepspeed.stage=3", SPARSEK],
}

# Dies at the beginning of step 5: the checkpoint of step 2 is complete, and that of step 4 may be half written.
DYING = """
import json, os, signal, sys
from sparsetrain.cli import main
from sparsetrain.training.step import Stepper
step = Stepper.take
def faulty(stepper, *arguments):
    if stepper.state.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(stepper, *arguments)
Stepper.take = faulty
main(json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def runs(tiny, pretrained, shared, ranks_of, run_folder):
    """Runs by case, ``whole`` and ``resumed``; and ``moved``, which stage 3 began and stage 2 ended."""
    model = json.dumps({"path": str(pretrained / "untied"), "dtype": "bfloat16"})
    architecture = json.dumps({**(load_recipe(tiny).recipe.model.architecture or {}), **DROPOUT})

    def command(name, folder, *more):
        own = [f"model={model}" if name.startswith("lora") else f"model.architecture={architecture}"]
        return ["run", str(tiny), *own, *CASES[name], "checkpoint.every=2", *more, "--output", str(folder)]

    def make(folder):
        dying = []
        for name in CASES:
            program = [sys.executable, "-c", DYING, json.dumps(command(name, folder / f"{name}-resumed"))]
            dying.append(ranks_of(program, folder / f"{name}-log"))
        for name in CASES:
            assert main(command(name, folder / f"{name}-whole")) == 0
        for process in dying:
            process.wait(-signal.SIGKILL)
        shutil.copytree(folder / "full-stage-3-resumed", folder / "moved")
        for name in CASES:
            broken = run_folder(folder / f"{name}-resumed")
            assert "step-000002" in broken.checkpoints
            assert len(broken.steps) == 4
            assert main(command(name, broken.path, "--resume")) == 0
        assert main(command("full-stage-3", folder / "moved", "deepspeed.stage=2", "--resume")) == 0

    folder = shared("resume", make)
    found = {name: tuple(run_folder(folder / f"{name}-{end}") for end in ("whole", "resumed")) for name in CASES}
    return found | {"moved": run_folder(folder / "moved")}


def random_state(run, step):
    record = json.loads((run.path / f"checkpoints/step-{step:06}/rank-00000.json").read_text())
    return {device: record["random"][device] for device in ("torch", "cuda")}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(runs, name):
    whole, resumed = runs[name]
    assert resumed.values("step") == [1, 2, 3, 4, 5, 6]
    for metric in ("loss", "grad_norm", "lr", "tokens"):
        assert resumed.values(metric) == whole.values(metric), metric
    assert len(set(whole.values("loss"))) == 6
    weights, wanted = (read_weights(run.path / "checkpoints/step-000006") for run in (resumed, whole))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[parameter], wanted[parameter]) for parameter in wanted)


@pytest.mark.parametrize("name", CASES)
def test_dropout_goes_on_in_the_random_state_of_the_device(runs, name):
    whole, resumed = runs[name]
    assert random_state(resumed, 6) == random_state(whole, 6)
    assert random_state(whole, 6)["cuda"] != random_state(whole, 4)["cuda"]


def test_what_stage_3_began_stage_2_ends_but_for_rounding(runs):
    whole, moved = runs["full-stage-3"][0], runs["moved"]
    assert moved.values("step") == [1, 2, 3, 4, 5, 6]
    assert moved.values("loss") == pytest.approx(whole.values("loss"), rel=2e-3)
    assert moved.values("grad_norm") == pytest.approx(whole.values("grad_norm"), rel=2e-2)
    weights, wanted = (read_weights(run.path / "checkpoints/step-000006") for run in (moved, whole))
    assert weights.keys() == wanted.keys()
    # A step of the schedule is up to 1e-2 long.
    assert max((weights[parameter] - wanted[parameter]).abs().max().item() for parameter in wanted) < 2e-3
