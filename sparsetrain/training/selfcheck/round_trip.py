"""The self-check that a run's export is correct: save the model, load it again, and compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsetrain.errors import SparsetrainError, TrainingError
from sparsetrain.modeling import load
from sparsetrain.modeling.adapter_folder import adapter_tensors, load_alone
from sparsetrain.modeling.adapters import has_adapters
from sparsetrain.modeling.reread import logits, own_tensors, relative_error, rounding, same_values
from sparsetrain.training.memory.host import available_host_memory
from sparsetrain.training.output.export import each_tensor
from sparsetrain.world import World

TOKENS = 64
"""Number of tokens for comparing logits."""


def check_round_trip(
    model: PreTrainedModel,
    folder: Path,
    export: Callable[[Path], object],
    tokens: torch.Tensor,
    world: World,
    *,
    trust_remote_code: bool = False,
) -> str:
    """Save the model, load it again, and compare tensors by name and logits.

    For a model with adapters only their tensors are compared; the base is not loaded a second time.

    Args:
        export: Writes the model into a folder.
        tokens: int64 ``[1, T]``, tokens of a document; the first of them are used.
        trust_remote_code: Load the model's own code, which was saved with it.

    Returns:
        The line to print.

    Raises:
        TrainingError: The saved model differs; raised on all ranks.
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
            fault = f"the saved model cannot be loaded: {error}"
        finally:
            shutil.rmtree(target)
    _agree(fault, world)
    if not room:
        return f"saved, but not loaded again: that needs {_size(model) / 2**30:,.1f} GiB more host memory"
    there = dict(own_tensors(reloaded, names)) if world.main else {}
    compared = 0
    for name, tensor in each_tensor(model, world, names):
        compared += 1
        if name not in there:
            fault = fault or f"{name} is not in the saved model"
        elif not same_values(tensor, there.pop(name)):
            fault = fault or f"{name} differs after saving and loading"
    if there:
        fault = fault or f"the saved model has {min(there)}, which the model does not have"
    _agree(fault, world)
    line = f"saved and loaded again bit for bit: {compared} tensors"
    if names is not None:
        return f"{line} of the adapters"
    return f"{line}{_compare_logits(model, reloaded, tokens[:, :TOKENS], world)}"


def _reload(target: Path, adapted: PreTrainedModel | None, trust_remote_code: bool) -> PreTrainedModel:
    # Initialising weights that are read afterwards must not change the random state of the run.
    with torch.random.fork_rng(devices=[]):
        if adapted is not None:
            return load_alone(target, adapted)
        return load(target, trust_remote_code=trust_remote_code)


def _compare_logits(model: PreTrainedModel, reloaded: Any, tokens: torch.Tensor, world: World) -> str:
    """The part of the line about logits, which are not compared if the device has no memory for a second model."""
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
    """Bytes of the unsharded weights."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def _agree(fault: str, world: World) -> None:
    """Raise on every rank if the check failed on any."""
    if world.largest(float(bool(fault))):
        raise TrainingError(f"self-check failed: {fault or 'on another rank, see its message'}")
