from __future__ import annotations

import json

import pytest

from sparsetrain.methods.base import DenseLayerRule
from sparsetrain.recipe import dump_recipe, load_recipe, plan_batch, shipped_recipes
from sparsetrain.recipe.describe import batch_facts, explained, summary
from sparsetrain.recipe.shipped import recipes_folder
from sparsetrain.training.deepspeed_config import deepspeed_config

REAL_MODELS = {
    "llama-3.2-1b-power-32k": 32768,
    "llama-3.1-8b-power-64k": 65536,
    "qwen3-0.6b-power-32k": 32768,
    "qwen3-8b-power-128k": 131072,
    "mistral-7b-power-32k": 32768,
    "llama-3.1-8b-power-lora-64k": 65536,
    "qwen3-8b-power-lora-64k": 65536,
}
SPARSEK = {
    "llama-3.2-1b-sparsek-full-32k": 32768,
    "llama-3.2-1b-sparsek-lora-32k": 32768,
    "llama-3.2-1b-sparsek-scorer-32k": 32768,
    "qwen3-8b-sparsek-lora-64k": 65536,
    "qwen3-8b-sparsek-scorer-64k": 65536,
}


@pytest.fixture(params=sorted(shipped_recipes()))
def name(request):
    return request.param


def test_every_shipped_recipe_is_valid_and_says_what_it_is(name):
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    assert loaded.notes == []
    assert len(summary(loaded.path)) > 20
    assert name in loaded.path.read_text(), "the head of a recipe shows the command that runs it"
    assert "tokens a step" in batch_facts(loaded.recipe, 1)


def test_every_shipped_recipe_survives_dump_and_listing(name, tmp_path):
    recipe = load_recipe(name).recipe
    for text in (dump_recipe(recipe), explained(recipe)):
        (tmp_path / "copy.yaml").write_text(text)
        assert load_recipe(tmp_path / "copy.yaml").recipe == recipe


def test_every_shipped_recipe_makes_a_deepspeed_config(name):
    recipe = load_recipe(name).recipe
    config = deepspeed_config(recipe, plan_batch(recipe, 1, rows_per_epoch=100))
    assert config["zero_optimization"]["stage"] == recipe.deepspeed.stage


@pytest.mark.parametrize("name", REAL_MODELS)
def test_recipes_for_real_models_use_the_papers_pattern(name):
    recipe = load_recipe(name).recipe
    assert recipe.sequence.length == REAL_MODELS[name]
    assert (recipe.attention.method, recipe.attention.block) == ("power", 256)
    assert (recipe.attention.window, recipe.attention.sinks) == (5, 1)
    assert isinstance(recipe.attention.dense_layers, DenseLayerRule)
    assert recipe.train.activation_checkpointing
    assert recipe.train.tokens is not None
    assert max(recipe.eval.passkey.lengths) == recipe.sequence.length
    assert plan_batch(recipe, 8).tokens_per_step == 2**20


@pytest.mark.parametrize("name", SPARSEK)
def test_sparsek_recipes_train_what_their_name_says(name):
    recipe = load_recipe(name).recipe
    assert recipe.sequence.length == SPARSEK[name]
    assert (recipe.attention.method, recipe.attention.dense_layers) == ("sparsek", [])
    assert (recipe.lora is not None) == ("-lora-" in name)
    assert (recipe.train.parameters == "new_modules") == ("-scorer-" in name)
    assert (recipe.train.new_modules_lr or recipe.train.lr) == 1e-3
    assert max(recipe.eval.passkey.lengths) == recipe.sequence.length
    assert plan_batch(recipe, 8).tokens_per_step == 2**20


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
