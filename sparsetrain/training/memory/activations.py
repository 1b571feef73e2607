"""Apply a recipe's memory settings: activation checkpointing, offloading of layer inputs, tiled MLPs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.batch import BatchPlan
from sparsetrain.recipe.schema import TrainSection
from sparsetrain.training.memory.activation_checkpointing import enable_activation_checkpointing
from sparsetrain.training.memory.activation_offload import ActivationOffload
from sparsetrain.training.memory.chunks import chunks_of
from sparsetrain.training.memory.liger import wants_liger
from sparsetrain.training.memory.tiled_mlp import tile_mlps


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


def save_activation_memory(model: PreTrainedModel, train: TrainSection, plan: BatchPlan, device: torch.device) -> str:
    """Apply checkpointing, offloading and tiling to a sparsified model; returns a description.

    Raises:
        ModelError: The model does not support a setting.
    """
    done = []
    if train.mlp_chunk is not None:
        num_chunks = chunks_of(plan.tokens_per_pass, train.mlp_chunk)
        if num_chunks > 1:
            done.append(f"{tile_mlps(model, num_chunks)} MLPs in {num_chunks} tiles each")
    if train.activation_checkpointing != "none":
        offload = ActivationOffload(device) if train.offload_activations else None
        enable_activation_checkpointing(model, train.activation_checkpointing, offload)
        kept = "attention outputs kept" if train.activation_checkpointing == "selective" else "fully recomputed"
        done.append(f"every layer checkpointed, {kept}{', its input in host memory' if offload else ''}")
    return "; ".join(done) or "every activation is kept"
