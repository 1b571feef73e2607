"""DeepSpeed's two ways to keep the inputs of checkpointed layers in host memory, in the place of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsetrain.bench.measure import Unavailable
from sparsetrain.modeling import sparse_layers
from sparsetrain.recipe import Recipe

Offload = Callable[[Any, Any, Recipe, torch.device], AbstractContextManager[None]]
"""Called with an engine, its model, the recipe and the device, before the first step; left behind the last one."""


NOTHING_TO_OFFLOAD = "no layer is checkpointed whose input could be offloaded; set train.activation_checkpointing=layer"


def refusal(offload: Offload, recipe: Recipe) -> str | None:
    """Why an offload cannot take a recipe, as far as that is known without its model; None if it may."""
    if recipe.train.activation_checkpointing == "none":
        return NOTHING_TO_OFFLOAD
    if offload is cpu_checkpointing and recipe.train.activation_checkpointing == "selective":
        return _cannot_keep("outputs of attention")
    return None


def _cannot_keep(what: str) -> str:
    return f"DeepSpeed's checkpoints recompute whole layers, and cannot keep {what}"


@contextmanager
def cpu_checkpointing(engine: Any, model: Any, recipe: Recipe, device: torch.device) -> Iterator[None]:
    """``deepspeed.checkpointing.checkpoint`` with ``cpu_checkpointing`` around every layer.

    It is reentrant, so that the first layer's input must need a gradient, and recomputes whole layers. On a CPU, where
    it would empty the tensors that it keeps, its checkpoints are taken without moving them.

    Raises:
        Unavailable: it cannot take this recipe.
    """
    from deepspeed.runtime.activation_checkpointing import checkpointing

    layers = _layers(model)
    selecting = any(method is not None and method.selection_operations for _, _, method in sparse_layers(model))
    if selecting:
        raise Unavailable(_cannot_keep(f"what attention.method={recipe.attention.method} selects"))
    model.enable_input_require_grads()
    checkpointing.configure(None, checkpoint_in_cpu=device.type == "cuda")
    for layer in layers:
        layer._gradient_checkpointing_func = checkpointing.checkpoint
    try:
        yield
    finally:
        checkpointing.reset()
        checkpointing.configure(None, checkpoint_in_cpu=False)


@contextmanager
def hidden_states_offload(engine: Any, model: Any, recipe: Recipe, device: torch.device) -> Iterator[None]:
    """DeepSpeed's hooks on the tensors that checkpoints save, around the forward and backward pass of each micro batch.

    On a CPU they let every tensor pass.

    Raises:
        Unavailable: it cannot take this recipe, or this version of DeepSpeed has none.
    """
    try:
        from deepspeed.runtime.activation_checkpointing import offload_activations
    except ImportError as error:
        raise Unavailable("this version of DeepSpeed has no CheckpointHiddenStatesOffload; 0.19.8 has") from error
    _layers(model)
    offload = offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager()
    backward, inside = engine.backward, False

    def enter(*_: Any) -> None:
        nonlocal inside
        offload.__enter__()
        inside = True

    def leave() -> None:
        nonlocal inside
        if inside:
            inside = False
            offload.__exit__(None, None, None)

    def backward_and_leave(*args: Any, **settings: Any) -> Any:
        try:
            return backward(*args, **settings)
        finally:
            leave()

    hook = engine.module.register_forward_pre_hook(enter)
    engine.backward = backward_and_leave
    try:
        yield
    finally:
        leave()  # where a forward pass failed
        hook.remove()
        del engine.backward


def _layers(model: Any) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise Unavailable(NOTHING_TO_OFFLOAD)
    return layers
