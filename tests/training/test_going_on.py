"""A run begins where another ended: with its adapters, trained further or merged, or with more steps."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.modeling.adapter_folder import load_adapters
from sparsetrain.modeling.adapters import merge_adapters

LORA = "lora={rank: 4, targets: linear, train_norms: true}"
SHORT = ["train.steps=2", "train.lr=0.02", "train.global_batch_sequences=2"]


@pytest.fixture(scope="module")
def first(tiny, pretrained, shared):
    """The run folder of adapters trained beside a pretrained model with a token more."""

    def make(folder):
        model = {"path": str(pretrained / "untied"), "dtype": "float32", "add_tokens": ["<|turn|>"]}
        assert (
            main(["run", str(tiny), f"model={json.dumps(model)}", LORA, *SHORT, "--output", str(folder / "run")]) == 0
        )

    return shared("going-on", make) / "run"


@pytest.fixture(scope="module")
def command(tiny, first):
    """``command(folder, *overrides)``: train on from the adapters, given as ``model.path``."""

    def arguments(folder, *overrides):
        model = json.dumps({"path": str(first / "final"), "dtype": "float32"})
        return ["run", str(tiny), f"model={model}", *SHORT, *overrides, "--output", str(folder)]

    return arguments


def test_adapters_are_trained_further(tmp_path, command, first, pretrained, run_folder, capfd):
    run = run_folder(tmp_path / "run")
    # A rate so small that what the run writes is what it began with.
    assert main(command(run.path, LORA, "train.lr=1e-12")) == 0
    said = capfd.readouterr().err
    assert (
        f"model.path is their base, {pretrained / 'untied'}, and train.start the adapters, which are trained further"
        in said
    )
    assert f"begun with the adapters in {first / 'final'}" in said
    before, after = (load_file(path / "final/adapter_model.safetensors") for path in (first, run.path))
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], tensor, atol=1e-7) for name, tensor in before.items())
    record = json.loads((run.path / "final/sparsetrain.json").read_text())
    assert record["model"]["path"] == str((pretrained / "untied").resolve())
    assert record["model"]["add_tokens"] == ["<|turn|>"]
    assert sum(name.endswith("trainable_tokens_delta") for name in after) == 2
    sparsetrain.load(run.path / "final")
    assert main(command(run.path, LORA, "train.lr=1e-12", "train.steps=3", "--resume")) == 0
    assert run.values("step") == [1, 2, 3]


def test_adapters_are_merged_without_lora(tmp_path, command, first, run_folder):
    run = run_folder(tmp_path / "run")
    assert main(command(run.path, "train.lr=1e-12")) == 0
    merged = merge_adapters(load_adapters(first / "final")).state_dict()
    assert run.weights.keys() == merged.keys()
    assert all(torch.allclose(run.weights[name], tensor, atol=1e-6) for name, tensor in merged.items())


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("lora={rank: 8, targets: linear, train_norms: true}", "have rank=4, and lora.rank is 8"),
        ("lora={rank: 4, alpha: 4, targets: linear, train_norms: true}", "have alpha=8, and lora.alpha is 4"),
        ("lora={rank: 4}", "lora.targets, train_embeddings and train_norms must be theirs"),
    ],
)
def test_other_adapters_are_refused(tmp_path, command, refused, tiny, lora, said):
    arguments = command(tmp_path / "run", lora)
    assert said in refused(*arguments)
    assert said in refused("recipe", "validate", *arguments[1:-2])


def test_a_finished_run_takes_more_steps(tmp_path, tiny, run_folder):
    whole, longer = run_folder(tmp_path / "whole"), run_folder(tmp_path / "longer")
    constant = ["run", str(tiny), "train.schedule=constant", "train.global_batch_sequences=2"]
    tasks = "tasks: [{task: passkey, lengths: [128], depths: 1, trials: 1, digits: 1}]"
    constant.append(f"eval={{every: 2, at_start: false, at_end: true, {tasks}}}")
    assert main([*constant, "train.steps=4", "--output", str(whole.path)]) == 0
    assert main([*constant, "train.steps=2", "--output", str(longer.path)]) == 0
    half = longer.weights
    more = ["train.steps=4", "train.schedule=wsd", "train.cooldown=1", "train.min_lr_ratio=0.1", "--resume"]
    assert main([*constant, *more, "--output", str(longer.path)]) == 0
    assert longer.values("loss") == whole.values("loss")
    assert longer.values("lr") == [*whole.values("lr")[:3], pytest.approx(0.1 * whole.values("lr")[3])]
    assert not torch.equal(longer.weights["lm_head.weight"], half["lm_head.weight"])
    results = json.loads((longer.path / "evaluation.json").read_text())
    assert list(results) == ["power, step 2", "power, after"], "compare takes the last one"
