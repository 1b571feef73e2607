"""The model of a recipe with random weights, made where it is measured: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsetrain.plan.shape import ModelShape, find_shape
from sparsetrain.recipe.schema import Recipe


def random_model(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """A model of the recipe's shape and dtype.

    Raises:
        ModelError: the shape is not known on this machine.
    """
    fields = recipe.model.architecture
    if fields is None:
        fields = _fields(find_shape(recipe.model))
    config = AutoConfig.for_model(**{**fields, "max_position_embeddings": recipe.sequence.length})
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, recipe.model.dtype), attn_implementation="sdpa"
        )


def _fields(shape: ModelShape) -> dict[str, Any]:
    """A transformers config of the Llama family."""
    kind = "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "llama"
    return {
        "model_type": kind,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
    }
