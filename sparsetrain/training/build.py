"""From a model that knows what it trains to the engine that trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.modeling import balance_factor
from sparsetrain.modeling.head import BALANCE_FACTORS
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.recipe.schema import ModelSection
from sparsetrain.training.engine import World, initialize
from sparsetrain.training.liger import wants_liger
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.memory import save_activation_memory
from sparsetrain.training.place import here
from sparsetrain.training.sequence_parallel import join_sequence_group


def build_engine(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: BatchPlan,
    config: dict[str, Any],
    world: World,
    say: Callable[[str], None],
) -> tuple[Any, Ulysses | None]:
    """The DeepSpeed engine around the loss of a sparsified model; every rank calls this.

    Args:
        config: DeepSpeed's, of :func:`~sparsetrain.training.deepspeed_config.deepspeed_config`.
        say: prints a line for the user.

    Returns:
        The engine, and what splits a forward pass where ranks share their sequences.

    Raises:
        ModelError: the model's activations cannot be saved as the recipe says.
        RecipeError: nothing is left to train.
    """
    say(f"memory: {save_activation_memory(model, recipe.train, plan, world.device)}")
    model.train()
    here.at("building the engine")
    check_balance(model, recipe.model)
    ulysses = join_sequence_group(recipe)
    fused = wants_liger(recipe.train.liger, world.device)
    loss = CausalLMLoss(model, recipe.train.loss_chunk, fused=fused, ulysses=ulysses)
    say(f"loss: {loss.describe()}")
    return initialize(loss, recipe, config, world), ulysses


def check_balance(model: PreTrainedModel, section: ModelSection) -> None:
    """Refuse a factor for the routers' balance loss in a recipe that leaves the loss itself off.

    Raises:
        ModelError: names the factor and the switch.
    """
    given = {**(section.architecture or {}), **section.config_overrides}
    for name in BALANCE_FACTORS:
        if given.get(name) and not balance_factor(model):
            raise ModelError(
                f"{name}={given[name]} has no effect: {type(model).__name__} adds the balance loss of its routers only "
                "with output_router_logits: true beside it"
            )
