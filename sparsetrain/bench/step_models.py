"""The model of a recipe with random weights, made where it is measured: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsetrain.plan.shape import find_shape
from sparsetrain.recipe.schema import Recipe


def random_model(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """A model of the recipe's shape and dtype.

    Raises:
        ModelError: the shape is not known on this machine.
    """
    fields = recipe.model.architecture
    fields = find_shape(recipe.model).as_config() if fields is None else {**fields, **recipe.model.config_overrides}
    config = AutoConfig.for_model(**{**fields, "max_position_embeddings": recipe.sequence.length})
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, recipe.model.dtype), attn_implementation="sdpa"
        )
