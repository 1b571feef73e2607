"""The checks before step 1 pass on a sound run and stop an unsound one with the reason."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.data import Row, build_rows, collate
from sparsetrain.errors import TrainingError
from sparsetrain.methods.static import StaticMethod
from sparsetrain.modeling import load_model, sparse_layers
from sparsetrain.patterns import SlidingPattern
from sparsetrain.training import run as training
from sparsetrain.training.selfcheck import forward as selfcheck


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe()


@pytest.fixture
def loaded(recipe, world):
    """Model and tokenizer of the tiny recipe."""
    model, tokenizer = load_model(recipe.model, recipe.attention, seed=0)
    return model.to(world.device), tokenizer


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def packed(recipe, loaded):
    """A row of several documents."""
    rows = build_rows(recipe.data, recipe.sequence, loaded[1], seed=1)
    return next(batch for batch in (collate([row]) for row in rows) if len(batch.cu_seqlens) > 3)


@pytest.fixture
def single(packed):
    """One long document, long enough for the pattern to leave blocks out."""
    ids = packed.input_ids[0].repeat(2)[:200].numpy()
    return collate([Row(ids, ids, [200], ["one"])])


@pytest.fixture
def attend(monkeypatch):
    """Replaces how the static methods attend: ``attend(lambda original, self, query, key, value, call: ...)``."""
    original = StaticMethod.attend

    def replace(act):
        def attend_otherwise(self, layer, query, key, value, **call):
            return act(lambda q, k, v, **c: original(self, layer, q, k, v, **c), self, query, key, value, call)

        monkeypatch.setattr(StaticMethod, "attend", attend_otherwise)

    return replace


def test_a_sound_model_passes_and_says_what_was_found(model, packed, single, world):
    documents = len(packed.cu_seqlens) - 1
    line = selfcheck.check_document_isolation(model, packed, world)
    assert f"{documents} in the row, largest change of the others 0.0e+00" in line
    assert "2 in the row" in selfcheck.check_document_isolation(model, single, world)
    assert "layer 0 equals its oracle on 200 tokens" in selfcheck.check_against_oracle(model, single, world)
    longest = int(packed.cu_seqlens.diff().max())
    assert f"on {longest} tokens" in selfcheck.check_against_oracle(model, packed, world)


@pytest.mark.parametrize("scores", ["head", "layer"])
@pytest.mark.parametrize("gate", ["value", "log", "straight"])
def test_a_sound_selection_passes(recipe, single, packed, world, gate, scores):
    attention = {"method": "sparsek", "topk": 8, "window": 16, "sinks": 2, "gate": gate, "scores": scores}
    model, _ = load_model(recipe.model, attention, seed=0)
    model.to(world.device)
    assert "layer 0 equals its oracle on 32 tokens" in selfcheck.check_against_oracle(model, single, world)
    assert "layer 0 equals its oracle" in selfcheck.check_against_oracle(model, packed, world)


@pytest.mark.parametrize("changed", [{"topk": 9}, {"window": 17}, {"sinks": 3}, {"gate": "log"}])
def test_another_selection_is_stopped(recipe, single, world, changed):
    attention = {"method": "sparsek", "topk": 8, "window": 16, "sinks": 2}
    model, _ = load_model(recipe.model, attention, seed=0)
    other, _ = load_model(recipe.model, {**attention, **changed}, seed=0)
    model.to(world.device)
    method = next(method for _, _, method in sparse_layers(model))
    method.attend = next(method for _, _, method in sparse_layers(other)).attend
    with pytest.raises(TrainingError, match="layer 0 differs from its oracle"):
        selfcheck.check_against_oracle(model, single, world)


def test_where_nothing_is_sparse_there_is_nothing_to_compare(recipe, single, world):
    model, _ = load_model(recipe.model, {"method": "full"}, seed=0)
    model.to(world.device)
    assert "layers attend in full" in selfcheck.check_against_oracle(model, single, world)


@pytest.mark.parametrize("batch", ["packed", "single"])
def test_a_method_that_leaks_across_documents_is_stopped(model, world, attend, request, batch):
    attend(lambda original, self, q, k, v, call: original(q, k, v, **{**call, "cu_seqlens": None}))
    with pytest.raises(TrainingError, match=r"self-check failed: documents leak: .* changed the others' hidden states"):
        selfcheck.check_document_isolation(model, request.getfixturevalue(batch), world)


def test_a_method_that_is_one_block_off_is_stopped(model, world, attend, single):
    def shifted(original, self, query, key, value, call):
        block = self.pattern.block
        return original(query, key.roll(block, dims=2), value.roll(block, dims=2), **call)

    attend(shifted)
    with pytest.raises(TrainingError, match=r"layer 0 differs from its oracle by \d"):
        selfcheck.check_against_oracle(model, single, world)


def test_a_method_that_follows_another_pattern_is_stopped(model, world, attend, single, monkeypatch):
    def sliding(original, self, query, key, value, call):
        other = StaticMethod(SlidingPattern(block=16, window=2, sinks=1))
        monkeypatch.undo()
        return other.attend(None, query, key, value, **call)

    attend(sliding)
    with pytest.raises(TrainingError, match="differs from its oracle"):
        selfcheck.check_against_oracle(model, single, world)


def test_weights_that_are_not_finite_are_called_so(model, world, packed):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        selfcheck.check_document_isolation(model, packed, world)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_parameter_the_loss_does_not_reach_stops_the_run(tmp_path, tiny, refused, monkeypatch, stage):
    def load_with_idle(*arguments, **settings):
        model, tokenizer = load_model(*arguments, **settings)
        norm = model.model.layers[1].input_layernorm

        def detached(hidden):
            scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
            return norm.weight.detach() * (hidden * scale)

        norm.forward = detached
        return model, tokenizer

    monkeypatch.setattr(training, "load_model", load_with_idle)
    error = refused("run", str(tiny), f"deepspeed.stage={stage}", "--output", str(tmp_path / "run"), code=3)
    assert "1 of 21 trainable parameters got no gradient (model.model.layers.1.input_layernorm.weight)" in error


def test_a_run_that_leaks_never_takes_a_step(tmp_path, tiny, refused, attend, run_folder):
    attend(lambda original, self, q, k, v, call: original(q, k, v, **{**call, "cu_seqlens": None}))
    run = run_folder(tmp_path / "run")
    assert "documents leak" in refused("run", str(tiny), "--output", str(run.path), code=3)
    assert run.steps == []
