"""Export the trained model as a transformers folder, or its adapters as a peft folder, at any ZeRO stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.counted import counted
from sparsetrain.durable import flush, flush_all, remove_path
from sparsetrain.errors import CheckpointError, TrainingError
from sparsetrain.modeling import save
from sparsetrain.modeling.adapter_folder import adapter_tensors, save_adapters
from sparsetrain.modeling.adapters import has_adapters
from sparsetrain.recipe.schema import ModelSection
from sparsetrain.world import World


def each_tensor(
    model: PreTrainedModel, world: World, names: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and full tensors ``[...]`` of parameters and persistent buffers on rank 0, and nothing on other
    ranks, which must exhaust the iterator too.

    Under ZeRO-3 a parameter is sharded and would be saved as an empty tensor, so all ranks gather each in turn.

    Args:
        names: The names to yield; by default all, and of tied parameters the first.
    """
    for name, parameter in model.named_parameters(remove_duplicate=names is None):
        if names is not None and name not in names:
            continue
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            full = None
            with GatheredParameters([parameter]):
                if world.main:
                    full = parameter.detach().cpu().clone()
            if full is not None:
                yield name, full
        elif world.main:
            yield name, parameter.detach()
    if world.main:
        wanted = model.state_dict().keys() if names is None else names
        yield from ((name, buffer) for name, buffer in model.named_buffers() if name in wanted)


def full_weights(model: PreTrainedModel, world: World, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors ``[...]`` of :func:`each_tensor` by name, on the CPU of rank 0; empty on other ranks.

    Raises:
        TrainingError: A tensor is empty nevertheless.
    """
    weights = {name: tensor.cpu() for name, tensor in each_tensor(model, world, names)}
    empty = sorted(name for name, tensor in weights.items() if tensor.numel() == 0)
    if empty:
        raise TrainingError(f"{counted(len(empty), 'tensor')} would be saved empty, among them {empty[0]}")
    return weights


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    base: ModelSection | None = None,
    *,
    whole: bool = False,
) -> None:
    """Write the model, or its adapters if it has any, with tokenizer and attention record into ``folder``.

    Args:
        base: The recipe's model section, which an adapter folder records.
        whole: Write atomically: into a temporary folder that is flushed and renamed.

    Raises:
        CheckpointError: The disk is full or not writable; partial output is removed.
    """
    if has_adapters(model):
        names = adapter_tensors(model)
        weights = {names[name]: tensor for name, tensor in full_weights(model, world, names).items()}
    else:
        weights = full_weights(model, world)
    if world.main:
        # Follow links: the user may have linked the folder to a larger disk.
        place = folder.resolve()
        target = place.with_name(f"{place.name}.tmp") if whole else place
        try:
            remove_path(target)
            if has_adapters(model):
                assert base is not None
                save_adapters(model, target, tokenizer, base=base, state_dict=weights)
            else:
                save(model, target, tokenizer, state_dict=weights)
            if whole:
                _commit(target, place)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(target, ignore_errors=True)
            fix = "fix that or free some space there" + (" and continue with --resume" if whole else "")
            raise CheckpointError(f"cannot write the model to {folder}: {error}; {fix}") from error
    torch.distributed.barrier()


def _commit(partial: Path, folder: Path) -> None:
    """Rename a complete folder to its final name, replacing an earlier one."""
    flush_all(partial)
    remove_path(folder)
    os.replace(partial, folder)
    flush(folder.parent)
