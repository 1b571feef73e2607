"""A checkpoint is taken up by another number of ranks, under another ZeRO stage, as if nothing had happened."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sparsetrain.cli import main
from sparsetrain.training.checkpoints import read_weights

KINDS = ("full", "lora")
LORA = "lora={rank: 4, targets: linear, train_norms: true}"


@pytest.fixture(scope="module")
def command(tiny, pretrained):
    """``command(kind, folder, *overrides)``: train everything, or adapters beside a pretrained model."""

    def arguments(kind, folder, *overrides):
        model = json.dumps({"path": str(pretrained / "untied"), "dtype": "float32"})
        own = [f"model={model}", LORA] if kind == "lora" else []
        return ["run", str(tiny), *own, "checkpoint.every=3", *overrides, "--output", str(folder)]

    return arguments


@pytest.fixture(scope="module")
def runs(command, shared, ranks_of, run_folder):
    """Runs by kind: ``one`` and ``two``, uninterrupted on so many; ``one-two`` and ``two-one``, changed half-way."""

    def make(folder):
        def halved(source, target):
            shutil.copytree(folder / source, folder / target)
            shutil.rmtree(folder / target / "checkpoints/step-000006")

        two = [command(kind, folder / f"two-{kind}", f"deepspeed.stage={stage}") for kind, stage in zip(KINDS, (2, 3))]
        ranks_of(two, folder / "log", 2).wait()
        for kind in KINDS:
            assert main(command(kind, folder / f"one-{kind}", "deepspeed.stage=1")) == 0
            halved(f"two-{kind}", f"two-one-{kind}")
            halved(f"one-{kind}", f"one-two-{kind}")
            # One rank, whose batch is cut into pairs of rows, without ZeRO or under it.
            changed = ["train.micro_batch=2", f"deepspeed.stage={0 if kind == 'full' else 2}", "--resume"]
            assert main(command(kind, folder / f"two-one-{kind}", *changed)) == 0
        again = [
            command(kind, folder / f"one-two-{kind}", f"deepspeed.stage={stage}", "--resume")
            for kind, stage in zip(KINDS, (3, 2))
        ]
        ranks_of(again, folder / "log", 2).wait()

    folder = shared("rank-changes", make)
    return {
        kind: {name: run_folder(folder / f"{name}-{kind}") for name in ("one", "two", "one-two", "two-one")}
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("changed", "before"), [("two-one", "two"), ("one-two", "one")])
def test_the_losses_go_on_equal_but_for_rounding(runs, kind, changed, before):
    run, uninterrupted = runs[kind][changed], runs[kind][before]
    assert run.values("step") == [1, 2, 3, 4, 5, 6]
    assert run.values("loss")[:3] == uninterrupted.values("loss")[:3]
    assert run.values("loss") == pytest.approx(uninterrupted.values("loss"), rel=2e-6)
    assert run.values("grad_norm") == pytest.approx(uninterrupted.values("grad_norm"), rel=1e-4)
    assert run.values("tokens") == uninterrupted.values("tokens")
    assert run.state("step-000006")["data"] == uninterrupted.state("step-000006")["data"]
    weights, wanted = (read_weights(each.path / "checkpoints/step-000006") for each in (run, uninterrupted))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


def test_the_first_step_after_the_change_has_the_same_weights(runs):
    """Another loss by more than rounding is what a moment or a weight that was lost would give; this tells which."""
    for kind in KINDS:
        two = runs[kind]["two"].path / "checkpoints/step-000003"
        assert sorted(file.name for file in two.glob("rank-*")) == [
            f"rank-0000{rank}.{suffix}" for rank in (0, 1) for suffix in ("json", "safetensors")
        ]
        whole = read_weights(runs[kind]["one"].path / "checkpoints/step-000003")
        for name, weight in read_weights(two).items():
            torch.testing.assert_close(whole[name], weight, rtol=0, atol=1e-5)
