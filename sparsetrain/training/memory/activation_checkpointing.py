"""Activation checkpointing: which activations of a decoder layer are saved for backward, and which are recomputed.

Every mode saves the input of each layer and recomputes the rest in backward, except two kinds of results:

- Selections, in every mode. A recomputed selection is equal only if its inputs are bitwise equal, which needs one
  device and deterministic matrix products; otherwise the gradient would not belong to the forward pass. Selections are
  small and expensive to compute.
- Outputs of attention (``selective``). Each has the size of one hidden state, and attention is by far the most
  expensive part of a layer to recompute at long lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparse_layers
from sparsetrain.training.memory.activation_offload import ActivationOffload
from sparsetrain.training.memory.kept_outputs import Keeps, keeping_contexts


def enable_activation_checkpointing(
    model: PreTrainedModel, mode: Literal["layer", "selective"], offload: ActivationOffload | None = None
) -> None:
    """Checkpoint every decoder layer of a sparsified model from its next training pass on.

    Args:
        mode: ``layer`` keeps selections, ``selective`` also the outputs of every attention operation.
        offload: Moves the layers' inputs to host memory until backward.

    Raises:
        ModelError: The model's layers cannot be checkpointed.
    """
    selections = frozenset().union(*(m.selection_operations for _, _, m in sparse_layers(model) if m is not None))
    keeps: Keeps = selections.__contains__ if mode == "layer" else is_attention
    # Reentrant checkpointing loses the gradient of layers whose inputs need none, which are all layers below the first
    # adapter.
    options: dict[str, Any] = {"use_reentrant": False}
    # Intercepting every operation has a small cost, so only do it if there is something to keep.
    if mode == "selective" or selections:
        options["context_fn"] = partial(keeping_contexts, keeps)
    # transformers renamed the method and will remove the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable(options)
    except ValueError as error:
        raise ModelError(f"train.activation_checkpointing: {error} Set it to none") from error
    if offload is None:
        return
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"train.offload_activations: the layers of {type(model).__name__} use their own checkpointing, "
            "which cannot be offloaded; set it to false"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(_offloaded, offload, options)


def is_attention(name: str) -> bool:
    """Whether an operation (``namespace::name``) is attention, or selects the keys of attention.

    These are our operations, and torch's fused kernels in dense layers. Attention composed of smaller operations (a
    soft cap or sinks in a dense layer) has no single result to keep, and is recomputed.
    """
    namespace, _, operation = name.partition("::")
    return namespace in ("sparsetrain", "torch_attn") or operation.startswith("_scaled_dot_product_")


def _offloaded(offload: ActivationOffload, options: dict[str, Any], layer: Callable[..., Any], *args: Any) -> Any:
    # The checkpoint saves its inputs outside its own hooks, so only these tensors are offloaded; recomputed ones stay
    # on the device.
    with offload:
        return checkpoint(layer, *args, **options)
