"""Build the DeepSpeed engine for a model whose trainable parameters are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sparsetrain.activity import activity
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.training.distributed.engine import initialize
from sparsetrain.training.distributed.launcher import ranks_of_this_host
from sparsetrain.training.distributed.sequence_parallel import join_sequence_group
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.memory.activation_offload import ActivationOffload
from sparsetrain.training.memory.activations import reserve_host_memory, save_activation_memory
from sparsetrain.training.memory.liger import wants_liger
from sparsetrain.training.preference.model import PreferenceLoss
from sparsetrain.world import World


@dataclass(frozen=True)
class Engine:
    """The DeepSpeed engine and its sequence parallelism."""

    deepspeed: Any
    """DeepSpeed's engine around :class:`~sparsetrain.training.loss.CausalLMLoss`."""
    ulysses: Ulysses | None
    """Splits a forward pass over ranks; None without sequence parallelism."""


def build_engine(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: BatchPlan,
    config: dict[str, Any],
    world: World,
    say: Callable[[str], None],
) -> Engine:
    """Build the DeepSpeed engine around the loss of a sparsified model; every rank calls this.

    Args:
        config: DeepSpeed's config from :func:`~sparsetrain.training.distributed.deepspeed_config.deepspeed_config`.
        say: Prints a line for the user.

    Raises:
        ModelError: The model does not support the recipe's settings that save activation memory.
        RecipeError: No parameter is trained, or the host has no memory for offloaded activations.
    """
    offload = ActivationOffload(world.device) if recipe.train.offload_activations else None
    say(f"memory: {save_activation_memory(model, recipe.train, plan, offload)}")
    if recipe.train.neftune is not None:
        from transformers.integrations.neftune import neftune_post_forward_hook  # with peft, which takes seconds

        embedding = model.get_input_embeddings()
        embedding.neftune_noise_alpha = recipe.train.neftune  # type: ignore[assignment]
        embedding.register_forward_hook(neftune_post_forward_hook)
        say(f"noise: NEFTune of {recipe.train.neftune:g} on the embeddings, in training alone")
    model.train()
    activity.at("building the engine")
    ulysses = join_sequence_group(recipe)
    loss: CausalLMLoss
    if recipe.preference is not None:
        loss = PreferenceLoss(model, recipe)
    else:
        fused = wants_liger(recipe.train.liger, world.device)
        loss = CausalLMLoss(model, recipe.train.loss_chunk, fused=fused, ulysses=ulysses)
    say(f"loss: {loss.describe()}")
    engine = initialize(loss, recipe, config, world)
    if offload is not None:
        # After the engine, whose states may be in host memory too.
        reserve_host_memory(offload, model, plan, world, ranks_of_this_host(world.size), say)
    return Engine(engine, ulysses)
