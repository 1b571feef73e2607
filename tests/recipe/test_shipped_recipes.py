from __future__ import annotations

import json

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsetrain.methods.base import DenseLayerRule
from sparsetrain.recipe import dump_recipe, load_recipe, plan_batch, shipped_recipes
from sparsetrain.recipe.describe import batch_facts, explained, summary
from sparsetrain.recipe.shipped import recipes_folder
from sparsetrain.training.distributed.deepspeed_config import deepspeed_config

REAL_MODELS = {
    "llama-3.2-1b-power-32k": 32768,
    "llama-3.1-8b-power-64k": 65536,
    "qwen3-0.6b-power-32k": 32768,
    "qwen3-8b-power-128k": 131072,
    "mistral-7b-power-32k": 32768,
    "llama-3.1-8b-power-lora-64k": 65536,
    "qwen3-8b-power-lora-64k": 65536,
    "llama-3.2-1b-power-lora-128k": 131072,
    "mistral-7b-power-lora-128k": 131072,
    "qwen3-32b-power-32k": 32768,
    "qwen3-32b-power-lora-64k": 65536,
}
LONGEST = ("llama-3.2-1b-power-1m", "llama-3.1-8b-power-lora-1m", "qwen3-8b-power-lora-1m")
SPARSEK = {
    "llama-3.2-1b-sparsek-full-32k": 32768,
    "llama-3.2-1b-sparsek-lora-32k": 32768,
    "llama-3.2-1b-sparsek-scorer-32k": 32768,
    "qwen3-8b-sparsek-lora-64k": 65536,
    "qwen3-8b-sparsek-scorer-64k": 65536,
    "llama-3.1-8b-sparsek-full-64k": 65536,
    "llama-3.1-8b-sparsek-lora-128k": 131072,
    "mistral-7b-sparsek-full-64k": 65536,
    "mistral-7b-sparsek-lora-32k": 32768,
    "qwen3-0.6b-sparsek-full-32k": 32768,
    "qwen3-0.6b-sparsek-lora-128k": 131072,
    "qwen3-8b-sparsek-full-32k": 32768,
    "qwen3-32b-sparsek-full-64k": 65536,
    "qwen3-32b-sparsek-qlora-32k": 32768,
}
RECYCLED = {
    "llama-3.2-1b-recycled-32k": 32768,
    "qwen3-8b-recycled-32k": 32768,
    "qwen3-8b-recycled-lora-32k": 32768,
    "qwen3-8b-recycled-128k": 131072,
    "qwen3-8b-recycled-lora-128k": 131072,
}
FAMILIES = ("llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b", "qwen3-8b", "qwen3-32b", "mistral-7b")
# What the positions of each model reach as it comes; beyond that a recipe says how they are stretched.
NATIVE = {"llama": 131072, "qwen3-32b": 40960, "qwen3": 32768, "mistral": 32768}


@pytest.fixture(params=sorted(shipped_recipes()))
def name(request):
    return request.param


def test_every_shipped_recipe_is_valid_and_says_what_it_is(name):
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    assert loaded.notes == []
    assert len(summary(loaded.path)) > 20
    assert name in loaded.path.read_text(), "the head of a recipe shows the command that runs it"
    assert "tokens a step" in batch_facts(loaded.recipe, loaded.recipe.sequence.parallel)


def test_every_shipped_recipe_survives_dump_and_listing(name, tmp_path):
    recipe = load_recipe(name).recipe
    for text in (dump_recipe(recipe), explained(recipe)):
        (tmp_path / "copy.yaml").write_text(text)
        assert load_recipe(tmp_path / "copy.yaml").recipe == recipe


def test_every_shipped_recipe_makes_a_deepspeed_config(name):
    recipe = load_recipe(name).recipe
    config = deepspeed_config(recipe, plan_batch(recipe, recipe.sequence.parallel, rows_per_epoch=100))
    assert config["zero_optimization"]["stage"] == recipe.deepspeed.stage


@pytest.mark.parametrize("name", REAL_MODELS)
def test_recipes_for_real_models_use_the_papers_pattern(name):
    recipe = load_recipe(name).recipe
    assert recipe.sequence.length == REAL_MODELS[name]
    assert (recipe.attention.method, recipe.attention.block) == ("power", 256)
    assert (recipe.attention.window, recipe.attention.sinks) == (5, 1)
    assert isinstance(recipe.attention.dense_layers, DenseLayerRule)
    assert recipe.train.activation_checkpointing == "layer"
    assert recipe.train.tokens is not None
    assert max(recipe.eval.by_name["passkey"].lengths) == recipe.sequence.length
    assert plan_batch(recipe, 8).tokens_per_step == 2**20


@pytest.mark.parametrize("name", SPARSEK)
def test_sparsek_recipes_train_what_their_name_says(name):
    recipe = load_recipe(name).recipe
    assert recipe.sequence.length == SPARSEK[name]
    assert (recipe.attention.method, recipe.attention.dense_layers) == ("sparsek", [])
    assert (recipe.lora is not None) == ("lora-" in name)
    assert (recipe.train.parameters == "new_modules") == ("-scorer-" in name)
    assert (recipe.train.new_modules_lr or recipe.train.lr) == 1e-3
    assert max(recipe.eval.by_name["passkey"].lengths) == recipe.sequence.length
    assert plan_batch(recipe, 8).tokens_per_step == 2**20


@pytest.mark.parametrize("name", RECYCLED)
def test_recycled_recipes_draw_segments_and_generate_with_one_of_them(name):
    recipe = load_recipe(name).recipe
    attention = recipe.attention
    assert recipe.sequence.length == RECYCLED[name]
    assert (attention.method, attention.dense_layers) == ("recycled", [])
    assert attention.fixed in attention.lengths
    assert (attention.fixed, attention.keep) == ((16, 1024) if recipe.sequence.length == 32768 else (32, 2048))
    assert (recipe.lora is not None) == ("lora-" in name)
    assert max(recipe.eval.by_name["passkey"].lengths) == recipe.sequence.length
    assert plan_batch(recipe, 8).tokens_per_step == 2**20


def test_the_recipe_for_pairs_holds_no_second_model_and_cuts_no_answer():
    recipe = load_recipe("qwen3-8b-power-dpo-32k").recipe
    assert (recipe.reference, recipe.data.long_documents) == ("adapters_off", "drop")
    assert recipe.eval.by_name["preference"].source.split != recipe.data.sources[0].split
    assert plan_batch(recipe, 8, rows_per_epoch=800).steps == 100


@pytest.mark.parametrize("name", LONGEST)
def test_the_longest_recipes_share_each_row_among_eight_ranks(name):
    recipe = load_recipe(name).recipe
    assert (recipe.sequence.length, recipe.sequence.parallel) == (2**20, 8)
    assert plan_batch(recipe, 8).tokens_per_step == 2**20
    assert max(recipe.eval.by_name["passkey"].lengths) < recipe.sequence.length, "an evaluation runs on one GPU"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["power", "sparsek"])
def test_every_family_is_trained_whole_and_with_adapters_by_both_methods(family, method):
    recipes = [load_recipe(name).recipe for name in shipped_recipes() if name.startswith(f"{family}-{method}")]
    trained = {recipe.lora is not None for recipe in recipes if recipe.train.parameters == "all"}
    assert trained == {True, False}


@pytest.mark.parametrize("name", [*REAL_MODELS, *SPARSEK, *RECYCLED, *LONGEST])
def test_positions_beyond_the_models_own_are_stretched_by_a_rule_that_transformers_takes(name):
    from transformers import AutoConfig

    recipe = load_recipe(name).recipe
    native = next(reach for family, reach in NATIVE.items() if name.startswith(family))
    overrides = recipe.model.config_overrides
    if recipe.sequence.length <= native:
        assert "rope_parameters" not in overrides
        return
    assert overrides["max_position_embeddings"] == recipe.sequence.length
    kind = "qwen3" if name.startswith("qwen3") else name.split("-")[0]
    config = AutoConfig.for_model(kind, **overrides)
    rope = config.rope_parameters
    assert rope["rope_type"] in ("yarn", "llama3")
    if rope["rope_type"] == "yarn":
        assert rope["factor"] * rope["original_max_position_embeddings"] == recipe.sequence.length
    ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device="cpu")


@pytest.mark.parametrize(
    ("file", "overrides"),
    [
        ("zero2", ["deepspeed.stage=2"]),
        ("zero3", ["deepspeed.stage=3"]),
        (
            "zero3-offload",
            ["deepspeed.stage=3", "deepspeed.offload_optimizer=cpu", "deepspeed.offload_parameters=cpu"],
        ),
    ],
)
def test_deepspeed_examples_fit_the_recipes(file, overrides):
    path = recipes_folder() / "deepspeed" / f"{file}.json"
    recipe = load_recipe("qwen3-0.6b-power-32k", [*overrides, f"deepspeed.config={path}"]).recipe
    config = deepspeed_config(recipe, plan_batch(recipe, 1))
    given = json.loads(path.read_text())["zero_optimization"]
    assert config["zero_optimization"] == given
    assert config["train_micro_batch_size_per_gpu"] == 1
