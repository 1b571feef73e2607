"""Every model type that can be planned, beside transformers' own model of a small config."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparsetrain
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.plan.shape import PLANNED, shape_of_config
from sparsetrain.training.trainable import choose_trainable, total_size, trainable_size

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 11,
    "num_attention_heads": 64,
    "intermediate_size": 96,
    "vocab_size": 512,
}
DECODERS = [kind for kind in PLANNED if kind != "gemma3"]
"""Gemma 3 with its vision tower has the decoder of ``gemma3_text``."""


def real_model(kind):
    fields = {**SIZES, "num_key_value_heads": 32, "head_dim": 16, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", DECODERS)
def test_what_a_config_does_not_say_is_what_transformers_takes(kind):
    whole = AutoConfig.for_model(kind, **SIZES, pad_token_id=0).to_dict()
    assert shape_of_config({"model_type": kind, **SIZES}, "here") == shape_of_config(whole, "there")


@pytest.mark.parametrize("kind", DECODERS)
def test_parameters_are_those_of_the_model(kind, setting):
    model = real_model(kind)
    planned = setting(shape=shape_of_config(model.config.to_dict(), kind)).parameters
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert planned.matrices + planned.embedding + planned.head == matrices
    # Some families have more norms in a layer, or fewer.
    assert planned.total == pytest.approx(total_size(model), rel=0.002)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3", "glm"])
@pytest.mark.parametrize(
    "targets", ["attention", "linear", r".*layers.1.*proj", r".*\.[0-7]\..*o_proj", ["10.mlp.down_proj"]]
)
def test_adapters_are_at_the_layers_that_peft_would_choose(kind, targets, setting):
    model = sparsetrain.sparsify(real_model(kind), {"method": "full"})
    planned = setting(
        shape=shape_of_config(model.config.to_dict(), kind), lora={"rank": 4, "targets": targets, "dora": True}
    )
    add_adapters(model, planned.recipe.lora)
    assert planned.parameters.trained == trainable_size(model)


def test_norms_are_trained_beside_adapters_and_biases_are_not(setting):
    model = sparsetrain.sparsify(real_model("qwen2"), {"method": "full"})
    planned = setting(shape=shape_of_config(model.config.to_dict(), "qwen2"), lora={"rank": 4, "train_norms": True})
    choose_trainable(model, planned.recipe)
    assert planned.parameters.trained == trainable_size(model)
