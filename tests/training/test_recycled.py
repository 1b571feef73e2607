"""Runs with recycled attention: over ranks, with adapters, resumed, saved, loaded and asked to generate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training.counted_operations import Count

from sparsetrain.cli import main
from sparsetrain.data.batch import Batch
from sparsetrain.data.sequence_part import sequence_part
from sparsetrain.errors import TrainingError
from sparsetrain.modeling import load, load_model, sparse_layers
from sparsetrain.modeling.attention.passes import planned_arguments
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.memory.activation_checkpointing import enable_activation_checkpointing
from sparsetrain.training.selfcheck import forward as selfcheck

RECYCLED = "attention={method: recycled, every: [4, 8, 16], keep: 12, sinks: 1, recent: 4, text_prefix: uniform}"
MEASURE = ["eval.at_end=true", "eval.tasks.passkey={lengths: [160], depths: 2, trials: 2}"]


@pytest.fixture(scope="module")
def arguments(tiny, pretrained):
    """``arguments(output, *overrides)``: the command that trains a pretrained model for three steps."""

    def command(output, *overrides):
        model = json.dumps({"path": str(pretrained / "tied"), "dtype": "float32"})
        short = ["train.steps=3", "train.log_every=1"]
        return ["run", str(tiny), f"model={model}", RECYCLED, *short, *overrides, "--output", str(output)]

    return command


@pytest.fixture(scope="module")
def runs(arguments, shared, ranks_of, run_folder):
    """Adapters trained by one rank, and by two under ZeRO-3 with checkpointed layers, once resumed."""

    def make(folder):
        adapters = ["lora={rank: 4}", "train.lr=0.05", *MEASURE]
        assert main(arguments(folder / "alone", *adapters, "deepspeed.stage=0")) == 0
        overrides = [*adapters, "train.activation_checkpointing=layer", "deepspeed.stage=3", "checkpoint.every=1"]
        sharded = arguments(folder / "sharded", *overrides)
        ranks_of([sharded], folder / "log", 2).wait()
        (folder / "sharded/final").rename(folder / "first-final")
        shutil.rmtree(folder / "sharded/checkpoints/step-000003")
        ranks_of([[*sharded, "--resume"]], folder / "log", 2).wait()

    folder = shared("recycled-runs", make)
    return run_folder(folder / "alone"), run_folder(folder / "sharded"), folder / "first-final"


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_two_ranks_with_recomputed_layers_train_as_one(runs):
    alone, sharded, _ = runs
    assert sharded.values("loss")[-3:] == pytest.approx(alone.values("loss"), rel=2e-6)
    mine, theirs = weights(sharded.path / "final"), weights(alone.path / "final")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-5)


def test_a_resumed_run_draws_the_same_segments(runs):
    _, sharded, first = runs
    for name, tensor in weights(first).items():
        assert torch.equal(weights(sharded.path / "final")[name], tensor)


def test_a_run_tells_how_much_weight_is_read(runs):
    alone, sharded, _ = runs
    for run in (alone, sharded):
        shares = {name: value for name, value in run.steps[0].items() if name.startswith("recycled/kept_mass/")}
        assert {"layer_00", "layer_01", "age_0001"} <= {name.rpartition("/")[2] for name in shares}
        assert all(0 < share <= 1.001 for share in shares.values())


def test_adapters_are_loaded_with_their_settings_and_generate(runs, capsys):
    alone, _, _ = runs
    model = load(alone.path / "final").eval()
    section = model.config.sparsetrain["decode"]
    assert (section["refresh"]["every"], section["refresh"]["keep"], section["recent"]) == (8, 12, 4)
    capsys.readouterr()
    options = ["--max-new-tokens", "20", "--temperature", "0"]
    assert main(["generate", str(alone.path / "final"), "--prompt", "the sky is blue " * 8, *options]) == 0
    said = capsys.readouterr()
    assert "attention recycled" in said.err
    assert "every=8" in said.err or "every 8" in said.err
    merged = alone.path / "merged"
    assert main(["export", str(alone.path), str(merged), "--merge"]) == 0
    whole = load(merged).eval()
    assert whole.config.sparsetrain["decode"] == section
    torch.manual_seed(0)
    tokens = torch.randint(5, 300, (1, 60))
    given = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **given), whole.generate(tokens, **given))


@pytest.fixture
def batch(tiny_recipe):
    """A row of a text, a prompt with an answer, and a text again."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 50, 170, 201]).int()
    positions = torch.cat([torch.arange(length) for length in bounds.diff().tolist()])[None]
    ids = torch.randint(1, 300, (1, 201))
    labels = ids.clone()
    labels[0, [0, *range(50, 150), 170]] = -100
    return Batch(ids, labels, positions, bounds, 98, ["a", "b", "c"], [1, 100, 1])


def test_what_ranks_share_is_planned_as_a_whole(batch):
    part = sequence_part(batch, 1, 4)
    assert part.prompts == [1, 100, 1, 3]
    assert part.cu_seqlens.tolist() == [0, 50, 170, 201, 204]


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_choices_are_kept_and_gradients_are_the_same_bit_for_bit(tiny_recipe, batch, mode):
    attention = {"method": "recycled", "every": [4, 8], "keep": 12, "recent": 4, "similarity": 0.5}
    gradients, calls = [], []
    for checkpointed in (False, True):
        model, _ = load_model(tiny_recipe().model, attention, seed=0)
        model.train()
        if checkpointed:
            enable_activation_checkpointing(model, mode)
        methods = [method for _, _, method in sparse_layers(model)]
        positions = (batch.labels[0, 1:] != -100).nonzero()[:, 0]
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens}
        with Count() as count:
            loss = CausalLMLoss(model, None)(
                **inputs,
                positions=positions,
                targets=batch.labels[0, positions + 1],
                num_chunks=1,
                planned=planned_arguments(methods, batch, seed=0, step=5),
            )
            loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append([count.seen[f"sparsetrain::{name}"] for name in ("key_choice", "recycled_gate")])
    assert calls == [[2, 2], [2, 2]]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient)


def test_prompts_and_steps_change_what_is_computed(tiny_recipe, batch):
    model, _ = load_model(tiny_recipe().model, {"method": "recycled", "every": [4, 16], "keep": 4, "recent": 1}, seed=0)
    method = sparse_layers(model)[0][2]
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens}

    def run(prompts, **draw):
        with torch.no_grad():
            return model(
                **inputs, use_cache=False, **planned_arguments([method], replace(batch, prompts=prompts), **draw)
            )

    first = run(batch.prompts, seed=0, step=0).logits
    assert torch.equal(run(batch.prompts, seed=0, step=0).logits, first)
    others = [run(batch.prompts, seed=0, step=step).logits for step in range(1, 6)]
    assert any(not torch.equal(other, first) for other in others)
    evaluated = run(batch.prompts).logits
    assert torch.equal(run(batch.prompts).logits, evaluated)
    assert not torch.allclose(run([1, 1, 1]).logits[:, 60:160], evaluated[:, 60:160], atol=1e-3)


def test_the_selfcheck_sees_another_choice(tiny_recipe, batch, world, monkeypatch):
    attention = {"method": "recycled", "every": 8, "keep": 6, "sinks": 1, "recent": 2}
    model, _ = load_model(tiny_recipe().model, attention, seed=0)
    model.to(world.device)
    assert "layer 0 equals its oracle on 32 tokens" in selfcheck.check_against_oracle(model, batch, world)
    other, _ = load_model(tiny_recipe().model, {**attention, "keep": 5}, seed=0)
    method, wrong = sparse_layers(model)[0][2], sparse_layers(other)[0][2]
    method.attend = wrong.attend
    with pytest.raises(TrainingError, match="layer 0 differs from its oracle"):
        selfcheck.check_against_oracle(model, batch, world)


def test_similarity_needs_all_heads(refused, tiny, tmp_path):
    attention = "attention={method: recycled, similarity: 0.9}"
    said = refused("run", str(tiny), attention, "sequence.parallel=2", "--output", str(tmp_path / "run"))
    assert "attention.similarity=0.9 compares the mean query of all heads" in said


def test_there_is_nothing_new_to_train_alone(refused, tiny, tmp_path):
    said = refused("run", str(tiny), RECYCLED, "train.parameters=new_modules", "--output", str(tmp_path / "run"))
    assert "new_modules" in said
