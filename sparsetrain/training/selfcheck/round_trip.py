"""The check before step 1 that what a run will save is what it trains: written, loaded again as a model, compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsetrain.errors import SparsetrainError, TrainingError
from sparsetrain.modeling import load
from sparsetrain.modeling.adapters import adapter_tensors, has_adapters, load_alone
from sparsetrain.modeling.reread import logits, own_tensors, relative_error, rounding, same_values
from sparsetrain.training.memory.host import available_host_memory
from sparsetrain.training.output.export import each_tensor
from sparsetrain.world import World

TOKENS = 64
"""How many tokens the logits are compared on."""


def check_round_trip(
    model: PreTrainedModel,
    folder: Path,
    export: Callable[[Path], object],
    tokens: torch.Tensor,
    world: World,
    *,
    trust_remote_code: bool = False,
) -> str:
    """What is saved is the model: it is written, loaded again, and compared by the model's own names and by its logits.

    Of a model with adapters their tensors are compared, in a model without any weights of its own: those of the base
    stay where they are.

    Args:
        export: writes the model into a folder.
        tokens: of a document ``[1, T]``; the first of them are used.
        trust_remote_code: load the model's own code, which was saved with it.

    Returns:
        The line to say.

    Raises:
        TrainingError: on all ranks; says what differs.
    """
    target = folder / "selfcheck.tmp"
    export(target)
    names = adapter_tensors(model) if has_adapters(model) else None
    room = world.largest(float(world.main and names is None and available_host_memory() < _size(model))) == 0
    reloaded: Any = None
    fault = ""
    if world.main:
        try:
            if room:
                reloaded = _reload(target, model if names else None, trust_remote_code)
        except SparsetrainError as error:
            fault = f"what was saved does not load again: {error}"
        finally:
            shutil.rmtree(target)
    _agree(fault, world)
    if not room:
        return f"saved, but not loaded again: the host has no room for {_size(model) / 2**30:,.1f} GiB more"
    there = dict(own_tensors(reloaded, names)) if world.main else {}
    compared = 0
    for name, tensor in each_tensor(model, world, names):
        compared += 1
        if name not in there:
            fault = fault or f"{name} is not in the saved model"
        elif not same_values(tensor, there.pop(name)):
            fault = fault or f"{name} comes back different from what was saved"
    if there:
        fault = fault or f"the saved model has {min(there)}, which was not there"
    _agree(fault, world)
    line = f"saved and loaded again bit for bit: {compared} tensors"
    if names is not None:
        return f"{line} of the adapters"
    return f"{line}{_compare_logits(model, reloaded, tokens[:, :TOKENS], world)}"


def _reload(target: Path, adapted: PreTrainedModel | None, trust_remote_code: bool) -> PreTrainedModel:
    # What is drawn for weights that are read afterwards must not be missing from the run.
    with torch.random.fork_rng(devices=[]):
        if adapted is not None:
            return load_alone(target, adapted)
        return load(target, trust_remote_code=trust_remote_code)


def _compare_logits(model: PreTrainedModel, reloaded: Any, tokens: torch.Tensor, world: World) -> str:
    """What to say of the logits; nothing where the device has no room for a second model."""
    short = (
        world.main and world.device.type == "cuda" and torch.cuda.mem_get_info(world.device)[0] < 1.2 * _size(reloaded)
    )
    if world.largest(float(short)):
        return ", whose logits were not compared: the device has no room for a second model"
    right = logits(model, tokens, world.device)
    error = 0.0
    if world.main:
        found = logits(reloaded.to(world.device, right.dtype), tokens, world.device)
        error = relative_error(found, right)
    error, limit = world.largest(error), rounding(right.dtype)
    reason = f"the saved model's logits differ from the model's by {error:.3g} (relative RMS, limit {limit:g})"
    _agree("" if error <= limit else reason, world)
    return f", logits of {tokens.shape[1]} tokens within {error:.1e}"


def _size(model: PreTrainedModel) -> int:
    """Bytes of the weights, all of them where this rank holds shards."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def _agree(fault: str, world: World) -> None:
    """Raise on every rank if the check failed on any."""
    if world.largest(float(bool(fault))):
        raise TrainingError(f"self-check failed: {fault or 'on another rank, see its message'}")
