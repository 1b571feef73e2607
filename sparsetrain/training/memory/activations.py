"""Apply a recipe's memory settings: activation checkpointing, offloading of layer inputs, tiled MLPs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsetrain.activity import activity
from sparsetrain.counted import counted
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.batch import BatchPlan
from sparsetrain.recipe.schema import TrainSection
from sparsetrain.training.memory.activation_checkpointing import enable_activation_checkpointing
from sparsetrain.training.memory.activation_offload import ActivationOffload
from sparsetrain.training.memory.chunks import chunks_of
from sparsetrain.training.memory.host import available_host_memory
from sparsetrain.training.memory.liger import wants_liger
from sparsetrain.training.memory.tiled_mlp import tile_mlps
from sparsetrain.world import World

SHOWN_EVERY = 5.0
"""Seconds between lines that show how much host memory is pinned."""


def check_memory_options(train: TrainSection, device: torch.device) -> None:
    """Refuse memory settings that this machine does not support, before models and data are loaded.

    Raises:
        RecipeError: A setting needs a GPU and there is none, or needs a package that is missing.
    """
    wants_liger(train.liger, device)
    if train.offload_activations and device.type != "cuda":
        raise RecipeError(
            "train.offload_activations moves activations off a GPU, and this machine has none; set it to false"
        )


def save_activation_memory(
    model: PreTrainedModel, train: TrainSection, plan: BatchPlan, offload: ActivationOffload | None = None
) -> str:
    """Apply checkpointing, offloading and tiling to a sparsified model; returns a description.

    Args:
        offload: Moves the inputs of layers to host memory, with ``train.offload_activations``.

    Raises:
        ModelError: The model does not support a setting.
    """
    done = []
    if train.mlp_chunk is not None:
        num_chunks = chunks_of(plan.tokens_per_pass, train.mlp_chunk)
        if num_chunks > 1:
            done.append(f"{tile_mlps(model, num_chunks)} MLPs in {num_chunks} tiles each")
    if train.activation_checkpointing != "none":
        enable_activation_checkpointing(model, train.activation_checkpointing, offload)
        kept = "attention outputs kept" if train.activation_checkpointing == "selective" else "fully recomputed"
        done.append(f"every layer checkpointed, {kept}{', its input in host memory' if offload else ''}")
    return "; ".join(done) or "every activation is kept"


def reserve_host_memory(
    offload: ActivationOffload,
    model: PreTrainedModel,
    plan: BatchPlan,
    world: World,
    ranks_here: int,
    say: Callable[[str], None],
) -> None:
    """Make the host memory for the inputs of all layers, and show how it goes; a collective operation.

    Args:
        ranks_here: Ranks that share the memory of this host.
        say: Prints a line for the user.

    Raises:
        RecipeError: A host, or the limit of a container, has too little left.
        TrainingError: The memory cannot be pinned.
    """
    width, dtype = model.config.get_text_config().hidden_size, model.get_input_embeddings().weight.dtype
    size = plan.tokens_per_pass * width * dtype.itemsize
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    if size < offload.smallest:
        return
    whole, room = layers * size, available_host_memory()
    if world.largest(float(ranks_here * whole > room)):
        least = -int(world.largest(-float(room)))  # the host that is short may be another
        raise RecipeError(
            f"train.offload_activations: the inputs of {layers} layers with {plan.tokens_per_pass:,} tokens take "
            f"{_gib(whole)} of host memory, {_gib(ranks_here * whole)} for {counted(ranks_here, 'rank')} "
            f"on a host, and {_gib(least)} are left there or in its container; set it to false, lower "
            "sequence.length, or give the host or the container more memory"
        )
    activity.at("pinning host memory")
    say(f"memory: pinning {_gib(whole)} of host memory for the inputs of {layers} layers, before the first step")
    began = shown = time.monotonic()

    def made(nbytes: int) -> None:
        nonlocal shown
        activity.moved()
        if time.monotonic() - shown >= SHOWN_EVERY:
            shown = time.monotonic()
            say(f"memory: {_gib(nbytes)} of {_gib(whole)} are pinned")

    offload.buffers.reserve(layers, size, made)
    say(f"memory: {_gib(offload.buffers.nbytes)} pinned in {time.monotonic() - began:,.1f} seconds")


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
