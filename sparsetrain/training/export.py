"""The trained model as a transformers folder, whatever the ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.errors import CheckpointError
from sparsetrain.modeling import save
from sparsetrain.training.engine import World


def full_weights(model: PreTrainedModel, world: World) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer in full, on the CPU of rank 0; empty on the other ranks.

    Under ZeRO-3 a parameter is a shard and saves as an empty tensor, so each is gathered in turn by all ranks together.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                if world.main:
                    weights[name] = parameter.detach().cpu().clone()
        elif world.main:
            weights[name] = parameter.detach().cpu()
    if world.main:
        persistent = model.state_dict().keys()
        weights |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    return weights


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World
) -> dict[str, torch.Tensor]:
    """Write the model, its tokenizer and its attention record into ``folder``; return the weights written (rank 0).

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    weights = full_weights(model, world)
    if world.main:
        try:
            save(model, folder, tokenizer, state_dict=weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the model to {folder}: {error}; free some space there") from error
    torch.distributed.barrier()
    return weights
