"""Activation checkpointing: which activations of a decoder layer are kept for backward, and which are made again.

Every mode keeps the input of each layer and recomputes the rest in backward. Two kinds of result are worth keeping:

- What was selected. A recompute finds the same as long as it sees the same bits, which holds on one device with
  deterministic matrix products; a selection that differed would be a gradient of something else than the forward pass.
  It is small and dear to find, so every mode keeps it.
- What attention returned (``selective``). It is of the size of one hidden state, and by far the dearest part of a layer
  at long lengths to compute again.
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
        mode: ``layer`` keeps selections, ``selective`` the outputs of every attention operation.
        offload: moves the layers' inputs to host memory until backward.

    Raises:
        ModelError: the model's layers cannot be checkpointed.
    """
    selections = frozenset().union(*(m.selection_operations for _, _, m in sparse_layers(model) if m is not None))
    keeps: Keeps = selections.__contains__ if mode == "layer" else is_attention
    # The reentrant kind would cut the gradient off where a layer's inputs need none, which is everywhere below the
    # first adapter.
    options: dict[str, Any] = {"use_reentrant": False}
    # Watching every operation costs a little, so only where there is something to keep.
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
            f"train.offload_activations: the layers of {type(model).__name__} are checkpointed in a way of their own, "
            "which cannot be offloaded; set it to false"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(_offloaded, offload, options)


def is_attention(name: str) -> bool:
    """Whether an operation (``namespace::name``) is attention, or finds what attention reads.

    Ours, and torch's fused kernels in dense layers. Attention put together from smaller operations (a soft cap or sinks
    in a layer that stays dense) has no single result to keep, and is recomputed.
    """
    namespace, _, operation = name.partition("::")
    return namespace in ("sparsetrain", "torch_attn") or operation.startswith("_scaled_dot_product_")


def _offloaded(offload: ActivationOffload, options: dict[str, Any], layer: Callable[..., Any], *args: Any) -> Any:
    # The checkpoint saves its inputs outside its own hooks, so these are the tensors that the offload sees; what is
    # recomputed inside stays where it is.
    with offload:
        return checkpoint(layer, *args, **options)
