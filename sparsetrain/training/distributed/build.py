"""From a model that knows what it trains to the engine that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sparsetrain.activity import activity
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.training.distributed.engine import initialize
from sparsetrain.training.distributed.sequence_parallel import join_sequence_group
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.memory.activations import save_activation_memory
from sparsetrain.training.memory.liger import wants_liger
from sparsetrain.world import World


@dataclass(frozen=True)
class Engine:
    """What takes the steps."""

    deepspeed: Any
    """DeepSpeed's engine around :class:`~sparsetrain.training.loss.CausalLMLoss`."""
    ulysses: Ulysses | None
    """What splits a forward pass where ranks share their sequences."""


def build_engine(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: BatchPlan,
    config: dict[str, Any],
    world: World,
    say: Callable[[str], None],
) -> Engine:
    """The DeepSpeed engine around the loss of a sparsified model; every rank calls this.

    Args:
        config: DeepSpeed's, of :func:`~sparsetrain.training.deepspeed_config.deepspeed_config`.
        say: prints a line for the user.

    Raises:
        ModelError: the model's activations cannot be saved as the recipe says.
        RecipeError: nothing is left to train.
    """
    say(f"memory: {save_activation_memory(model, recipe.train, plan, world.device)}")
    model.train()
    activity.at("building the engine")
    ulysses = join_sequence_group(recipe)
    fused = wants_liger(recipe.train.liger, world.device)
    loss = CausalLMLoss(model, recipe.train.loss_chunk, fused=fused, ulysses=ulysses)
    say(f"loss: {loss.describe()}")
    return Engine(initialize(loss, recipe, config, world), ulysses)
