"""The message for out-of-memory errors: memory used, sequence length, and the settings that would help most."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import torch

from sparsetrain.activity import activity
from sparsetrain.counted import counted
from sparsetrain.errors import TrainingError, first_line
from sparsetrain.recipe.batch import batch_shape
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.changes import may_change
from sparsetrain.training.memory.host import allowed_host_memory
from sparsetrain.world import World

SETTINGS_NAMED = 3
FRAGMENTED = 0.05
"""Fraction of device memory that may be reserved but unused before the message mentions fragmentation."""

# Not every failed allocation has its own exception class: cuBLAS and the driver raise plain errors.
_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explain_out_of_memory(error: BaseException, recipe: Recipe, world: World) -> TrainingError:
    """The error to raise instead, with the peak, the sequence length, and the three unused settings that save most."""
    rows = counted(recipe.train.micro_batch, "row")
    settings = [_with_its_run(setting) for setting in settings_that_help(recipe, world)]
    message = (
        f"out of memory in {activity} ({first_line(error).rstrip('.')}): {_used(world.device)}, with {rows} of "
        f"{recipe.sequence.length:,} tokens at once. "
    )
    if settings:
        message += f"What would help most: {'; '.join(settings[:SETTINGS_NAMED])}. "
    if world.device.type == "cuda" and (idle := _fragmented(world.device)):
        message += (
            f"{_gib(idle)} of the device are reserved but too scattered to be used: the environment variable "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True gives most of that back. "
        )
    return TrainingError(message.rstrip())


def _with_its_run(setting: str) -> str:
    """A setting, with a note if it needs a new run because a resumed run must not change it."""
    return setting if may_change(setting.partition(": ")[0]) else f"{setting}, in a new run (another output)"


def settings_that_help(recipe: Recipe, world: World) -> Iterator[str]:
    """Unused settings that save memory, in the order to try them: in forward and backward first those for activations,
    elsewhere first those for weights, gradients and optimizer state.
    """
    length = recipe.sequence.length
    activations, states = list(_for_activations(recipe, world)), list(_for_states(recipe, world))
    if activity.part.startswith("evaluating"):
        yield from _for_evaluation(recipe)
    if activity.part in ("forward", "backward") or activity.part.startswith("evaluating"):
        yield from activations + states
    else:
        yield from states + activations
    yield f"sequence.length: {length // 2} (now {length})"


def _for_activations(recipe: Recipe, world: World) -> Iterator[str]:
    train, cuda = recipe.train, world.device.type == "cuda"
    tokens = recipe.sequence.length * train.micro_batch
    # A resumed run keeps its global batch, which depends on both settings if the recipe does not set it.
    shape = batch_shape(recipe, world.size)
    said = train.global_batch_sequences is not None or train.global_batch_tokens is not None
    kept = "" if said else f" with train.global_batch_sequences: {shape.global_batch_sequences}"
    if train.micro_batch > 1:
        yield f"train.micro_batch: 1{kept} (now {train.micro_batch}, accumulation keeps the global batch)"
    if train.activation_checkpointing != "layer":
        yield f"train.activation_checkpointing: layer (now {train.activation_checkpointing})"
    chunk = max(256, min(4096, tokens // 8))
    if train.loss_chunk is None or train.loss_chunk > 2 * chunk:
        yield f"train.loss_chunk: {chunk} (now {'null' if train.loss_chunk is None else train.loss_chunk})"
    if train.mlp_chunk is None and tokens > chunk:
        yield f"train.mlp_chunk: {chunk} (now null)"
    if train.activation_checkpointing != "none" and not train.offload_activations and cuda:
        yield "train.offload_activations: true (inputs of checkpointed layers are kept in host memory)"
    if world.size % (2 * recipe.sequence.parallel) == 0:
        parallel = recipe.sequence.parallel
        yield f"sequence.parallel: {2 * parallel}{kept} (now {parallel}, ranks share a row)"


def _for_states(recipe: Recipe, world: World) -> Iterator[str]:
    section, lora = recipe.deepspeed, recipe.lora
    quantized = recipe.base_bits != "none"
    if world.size > 1 and section.stage < (2 if quantized else 3):
        yield f"deepspeed.stage: {2 if section.stage < 2 else 3} (now {section.stage}, more is sharded over ranks)"
    if section.offload_optimizer == "none" and section.stage > 0 and world.device.type == "cuda":
        yield "deepspeed.offload_optimizer: cpu (optimizer state is kept in host memory)"
    if lora is not None and not quantized and section.stage < 3 and world.device.type == "cuda":
        yield "lora.quantize_base: 4bit (a quarter of the frozen weights)"
    if lora is None and recipe.train.parameters == "all" and recipe.model.path is not None:
        yield "lora: {} (gradients and the optimizer's state shrink to those of the adapters)"
    if recipe.model.dtype == "float32":
        yield "model.dtype: bfloat16 (half of weights and activations)"


def _for_evaluation(recipe: Recipe) -> Iterator[str]:
    for task in recipe.eval.tasks:
        for field, lengths in task.lengths_by_field().items():
            longest = max(lengths)
            if longest > recipe.sequence.length // 2:
                yield f"{task.path(field)}: up to {longest // 2} (now up to {longest})"


def _used(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        held = f", {_gib(others)} of which other processes and libraries hold" if others > total // 20 else ""
        peak = torch.cuda.max_memory_allocated(device)
        return f"the peak was {_gib(peak)} of the {_gib(total)} of {torch.cuda.get_device_name(device)}{held}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"the peak of this process was {_gib(peak)}, and it may use {_gib(allowed_host_memory())}"


def _fragmented(device: torch.device) -> int:
    """Bytes that torch's allocator has reserved but not used, if they are many and segments are not expandable."""
    configured = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in configured:
        return 0
    # Use the peak, because the failed step has released its memory already.
    idle = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return idle if idle > FRAGMENTED * torch.cuda.get_device_properties(device).total_memory else 0


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
