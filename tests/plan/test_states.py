"""Weights, gradients and optimizer, counted by hand and as a real DeepSpeed engine holds them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn

from sparsetrain.errors import RecipeError
from sparsetrain.plan.devices import find_device
from sparsetrain.plan.memory import estimate_memory
from sparsetrain.plan.setting import Setting
from sparsetrain.plan.shape import ModelShape, find_shape
from sparsetrain.plan.states import count_states, weight_bytes
from sparsetrain.plan.suggest import suggest
from sparsetrain.recipe import load_recipe

# Of tests/plan/conftest.py's shape: a layer's projections, its two norms and its two norms of heads.
MATRICES = 4 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128)
NORMS = 4 * (2 * 64 + 2 * 16) + 64
EMBEDDING = 1000 * 64
TOTAL = MATRICES + NORMS + 2 * EMBEDDING


def test_parameters_are_counted_by_part(setting):
    parameters = setting().parameters
    assert (parameters.matrices, parameters.norms) == (MATRICES, NORMS)
    assert (parameters.embedding, parameters.head) == (EMBEDDING, EMBEDDING)
    assert parameters.total == parameters.trained == TOTAL


def test_a_tied_head_is_counted_once(setting, shape):
    assert setting(shape=replace(shape, tied=True)).parameters.total == TOTAL - EMBEDDING


@pytest.mark.parametrize(
    ("lora", "trained"),
    [
        # Rank 8: of each layer's queries, keys, values and outputs 8 rows in and 8 columns out.
        ({"rank": 8}, 4 * 8 * (128 + 96 + 96 + 128)),
        ({"rank": 8, "targets": "linear"}, 4 * 8 * (128 + 96 + 96 + 128 + 3 * 192)),
        ({"rank": 8, "targets": ["q_proj", "mlp.down_proj"]}, 4 * 8 * (128 + 192)),
        ({"rank": 8, "targets": r".*\.[kv]_proj"}, 4 * 8 * (96 + 96)),
        ({"rank": 8, "targets": r".*layers.1.*proj"}, 8 * (448 + 576)),
        ({"rank": 8, "targets": r".*layers.[0-2].*mlp.*"}, 3 * 8 * 576),
        ({"rank": 8, "targets": ["lm_head", "q_proj"]}, 8 * (1000 + 64) + 4 * 8 * 128),
        ({"rank": 8, "dora": True}, 4 * (8 * (128 + 96 + 96 + 128) + 64 + 32 + 32 + 64)),
        ({"rank": 8, "train_embeddings": True, "train_norms": True}, 4 * 8 * 448 + EMBEDDING + NORMS),
    ],
)
def test_adapters_are_what_peft_would_train(setting, lora, trained):
    parameters = setting(lora=lora).parameters
    assert parameters.trained == trained
    assert parameters.trained + parameters.matrices >= parameters.adapters


@pytest.mark.parametrize("targets", [["nope"], ["q_proj", "nope"], "nope|mlp", r"layers.1.*proj", r".*layers.9.*"])
def test_targets_that_match_nothing_are_refused_as_the_run_does(setting, targets):
    with pytest.raises(RecipeError, match=r"lora.targets: .*matches no linear layer.*down_proj, .*lm_head, .*layers.0"):
        _ = setting(lora={"targets": targets}).parameters


def test_an_adapter_for_a_tied_head_is_refused_as_the_run_does(setting, shape):
    for targets in (["lm_head"], ".*"):
        with pytest.raises(RecipeError, match=r"lora.targets names the output head.*\(tied\)"):
            _ = setting(shape=replace(shape, tied=True), lora={"targets": targets}).parameters


def test_scorers_alone_are_a_row_and_a_gain_for_each_head(setting):
    planned = setting(
        attention={"method": "sparsek", "dense_layers": [0]}, train={"parameters": "new_modules"}, model={"path": "x/y"}
    )
    assert planned.parameters.trained == 3 * 2 * (64 + 1)


@pytest.mark.parametrize(
    ("stage", "weights", "masters", "moments", "gradients"),
    [(0, 2, 4, 8, 2), (1, 2, 1, 2, 2), (2, 2, 1, 2, 0.5), (3, 0.5, 1, 2, 0.5)],
)
def test_four_ranks_hold_what_their_stage_leaves_them(setting, stage, weights, masters, moments, gradients):
    states = count_states(setting(ranks=4, deepspeed={"stage": stage}))
    found = (states.weights, states.masters, states.moments, states.gradients)
    assert found == pytest.approx([TOTAL * each for each in (weights, masters, moments, gradients)])


def test_buckets_have_the_size_that_the_json_gives_them(setting):
    def bucket(config):
        return count_states(setting(ranks=2, deepspeed={"stage": 2, "config": config})).bucket

    assert bucket(None) == 2 * TOTAL
    assert bucket({"zero_optimization": {"reduce_bucket_size": 1000}}) == 2 * 1000
    assert bucket({"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}}) == 2 * 2 * 1000
    assert count_states(setting(deepspeed={"stage": 0})).bucket == 0


def test_offloaded_states_are_on_the_host(setting):
    states = count_states(setting(ranks=2, deepspeed={"stage": 2, "offload_optimizer": "cpu"}))
    assert (states.optimizer, states.gradients) == (0, 0)
    assert states.host == 9 * TOTAL
    both = {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    states = count_states(setting(ranks=2, deepspeed=both))
    assert states.weights == 0
    assert states.host == 10 * TOTAL


def test_quantised_matrices_are_counted_in_their_bits(setting):
    def weights(bits):
        planned = setting(lora={"rank": 8, "quantize_base": bits})
        rest = planned.parameters.total - MATRICES
        return (weight_bytes(planned) - 2 * rest) / MATRICES

    assert weights("none") == 2
    assert weights("8bit") == 1
    assert weights("4bit") == pytest.approx(0.516, abs=0.001)


def test_zero_3_begins_with_its_shard_unless_the_model_runs_before(setting):
    def load(**sections):
        phase = estimate_memory(setting(ranks=8, deepspeed={"stage": 3}, **sections)).phases[0]
        assert phase.name == "load"
        return phase.total

    measured = {"tasks": [{"task": "passkey", "lengths": [512]}]}
    largest = 1000 * 64
    assert load() == load(eval={**measured, "at_start": False}) == 2 * (TOTAL / 8 + largest)
    assert load(eval=measured) == 2 * TOTAL
    assert load(attention={"method": "sparsek", "topk": 64, "window": 64, "init": "attention"}) > 2 * TOTAL


def test_a_model_larger_than_a_gpu_is_sharded_as_it_is_read(setting, recipe_of):
    large = ModelShape(
        layers=80,
        hidden=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        intermediate=28672,
        vocab=128256,
        tied=False,
        qk_norm=False,
    )
    sections = {"lora": {"rank": 16}, "eval": {"tasks": [{"task": "passkey", "lengths": [512]}]}}
    planned = setting(ranks=8, shape=large, **sections)
    assert estimate_memory(planned).needed > 80e9

    def reload(overrides):
        fields = {"deepspeed": {"stage": 0}, **sections}
        for override in overrides:
            (section, name), value = override.partition("=")[0].split("."), override.partition("=")[2]
            fields[section] = {**fields.get(section, {}), name: yaml.safe_load(value)}
        return recipe_of(**fields)

    suggestion = suggest(planned, 80e9, reload, lambda recipe: replace(planned, recipe=recipe))
    assert set(suggestion.combination) >= {"deepspeed.stage=3", "eval.at_start=false"}
    assert suggestion.needed < 80e9


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bfloat16"), (0, "float32"), (2, "bfloat16"), (2, "float32")])
def test_an_engine_holds_the_bytes_of_the_plan(stage, dtype, world):
    """The embedded model in a real engine of one rank: its weights, and its optimizer after a step."""
    from sparsetrain.modeling import load_model
    from sparsetrain.recipe import plan_batch
    from sparsetrain.training.distributed.deepspeed_config import deepspeed_config
    from sparsetrain.training.distributed.engine import initialize

    recipe = load_recipe(
        "quickstart", [f"deepspeed.stage={stage}", f"model.dtype={dtype}", "train.micro_batch=1"]
    ).recipe
    model, _ = load_model(recipe.model, recipe.attention, seed=0)
    engine = initialize(_Sum(model), recipe, deepspeed_config(recipe, plan_batch(recipe, 1)), world)
    engine.backward(engine())
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    if stage == 2:
        held = sum(part.nbytes for parts in engine.optimizer.averaged_gradients.values() for part in parts)
    engine.step()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    owned = [p for group in inner.param_groups for p in group["params"]]
    moments = sum(state[name].nbytes for state in inner.state.values() for name in ("exp_avg", "exp_avg_sq"))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    masters = sum(p.nbytes for p in owned if p.untyped_storage().data_ptr() not in weights)

    planned = Setting(recipe, find_shape(recipe.model), 1, find_device("h200"), liger=False)
    states = count_states(planned)
    # DeepSpeed pads a group of parameters to what its collectives need.
    assert sum(p.nbytes for p in model.parameters()) == states.weights
    assert held == pytest.approx(states.gradients, rel=1e-5)
    assert moments == pytest.approx(states.moments, rel=1e-5)
    assert masters == pytest.approx(states.masters, rel=1e-5)


class _Sum(nn.Module):
    """A loss that reaches every parameter, without a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> torch.Tensor:
        return torch.stack([parameter.float().sum() for parameter in self.model.parameters()]).sum()


def test_frozen_parameters_are_not_counted_as_trained(setting):
    def trained(*names):
        return setting(train={"freeze": list(names)}).parameters.trained

    assert trained("embed_tokens") == TOTAL - EMBEDDING
    assert trained("lm_head", "embed_tokens", "layers") == 64
    assert trained("layers.0") == TOTAL - (MATRICES + NORMS - 64) // 4
    with pytest.raises(RecipeError, match=r"train.freeze: layer names no parameter of the model; did you mean layers"):
        trained("layer")


@pytest.mark.parametrize(
    ("optimizer", "stage", "moments"),
    [
        ({"name": "adamw_8bit"}, 2, 2.03125 * TOTAL),
        ({"states": "bfloat16"}, 2, 4 * TOTAL),
        ({"name": "adafactor"}, 0, 4 * NORMS),
        ({"name": "muon"}, 2, 2 * MATRICES + 8 * (TOTAL - MATRICES)),
    ],
)
def test_each_optimizer_has_states_of_its_own(setting, optimizer, stage, moments):
    states = count_states(setting(train={"optimizer": optimizer}, deepspeed={"stage": stage}))
    assert states.moments == moments
    assert states.masters == (2 if "states" in optimizer else 4) * TOTAL
