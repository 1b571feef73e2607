"""Early stopping, frozen parameters and noise on embeddings."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from sparsetrain.cli import main
from sparsetrain.training.output import board

MEASURED = [
    "eval={every: 1, at_start: false, at_end: false, tasks: [{task: passkey, lengths: [160], depths: 1, trials: 1}]}",
    "eval.early_stopping={task: passkey, patience: 2}",
    "train.tokens=6144",  # six steps
]


def test_training_ends_after_evaluations_without_a_new_best(tmp_path, tiny, run_folder, capfd):
    """No passkey is found after any step, so the first evaluation stays the best; another patience goes on."""
    run = run_folder(tmp_path / "run")
    profiled = "train.profile={steps: [5, 6]}"
    assert main(["run", str(tiny), *MEASURED, profiled, "--output", str(run.path)]) == 0
    assert run.values("step") == [1, 2, 3]
    assert run.checkpoints == ["step-000003"]
    assert (run.path / "final/model.safetensors").is_file()
    said = capfd.readouterr().err
    assert "stopping early: passkey has not improved in 2 evaluations, since step 1" in said
    assert "no profile: training ended with step 3, before step 5 (train.profile)" in said
    assert main(["run", str(tiny), *MEASURED, "--resume", "--output", str(run.path)]) == 0
    assert run.values("step") == [1, 2, 3]
    assert main(["runs", str(tmp_path)]) == 0
    assert re.search(r"run +finished \(early stopping\) +3/6 ", capfd.readouterr().out)
    changed = [*MEASURED, "eval.early_stopping.patience=9", "--resume"]
    assert main(["run", str(tiny), *changed, "--output", str(run.path)]) == 0
    assert run.values("step") == [1, 2, 3, 4, 5, 6]


def test_frozen_parameters_stay_as_they_are(tmp_path, tiny, pretrained, capfd):
    command = ["run", str(tiny), f"model={{path: {pretrained / 'untied'}, dtype: float32}}", "train.steps=2"]
    assert main([*command, "train.freeze=[embed_tokens, layers.1, mlp]", "--output", str(tmp_path / "run")]) == 0
    assert "trained: everything but embed_tokens, layers.1, mlp" in capfd.readouterr().err
    before, after = (load_file(f / "model.safetensors") for f in (pretrained / "untied", tmp_path / "run/final"))
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert same == {name for name in before if "embed_tokens" in name or "layers.1." in name or ".mlp." in name}


def test_noise_is_added_and_a_step_is_traced(tmp_path, tiny, run_folder):
    plain, noisy = run_folder(tmp_path / "plain"), run_folder(tmp_path / "noisy")
    short = ["train.steps=2", "checkpoint.export=false", "train.profile={steps: [2, 2]}"]
    assert main(["run", str(tiny), *short, "--output", str(plain.path)]) == 0
    assert main(["run", str(tiny), *short, "train.neftune=50", "--output", str(noisy.path)]) == 0
    assert noisy.values("loss") != plain.values("loss")
    assert noisy.values("loss") == pytest.approx(plain.values("loss"), rel=0.2)
    # Both also traced their second step.
    trace = gzip.decompress((plain.path / "profile-000002-000002.json.gz").read_bytes())
    events = json.loads(trace)["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.freeze=[embed_token, layers.99]"],
            "train.freeze: embed_token names no parameter of LlamaForCausalLM; did you mean embed_tokens?\n"
            "train.freeze: layers.99 names no parameter of LlamaForCausalLM; layers has 0 to ",
        ),
        (["train.freeze=[model, lm_head]"], "trains no parameters"),
        (["eval.early_stopping={task: passkey}"], "passkey is not measured during training: give eval.every"),
        (["train.profile={steps: [5, 7]}"], "step 7 is not in a run of train.steps=6"),
        (["tracking=[tensorboard]"], "tracking: tensorboard is not installed; `pip install sparsetrain[tensorboard]`"),
        (["train.neftune=5", "sequence.parallel=2"], "the noise is scaled by whole rows"),
    ],
)
def test_what_would_do_nothing_is_refused(tiny, refused, tmp_path, monkeypatch, overrides, said):
    monkeypatch.setattr(board.util, "find_spec", lambda name: None)
    assert said in refused("run", str(tiny), *overrides, "--output", str(tmp_path / "run"))
