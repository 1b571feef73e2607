"""Liger's fused Triton kernels in training: in the layers (:mod:`sparsetrain.modeling.fused_layers`), and for the
loss."""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsetrain.data.document import IGNORE
from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.modeling import fused_layers, has_plain_head
from sparsetrain.modeling.token_rows import layers_with_rows

Choice = Literal["auto", "on", "off"]


def wants_liger(choice: Choice, device: torch.device) -> bool:
    """Whether the kernels are to be used on this machine.

    Raises:
        RecipeError: ``on`` without a CUDA device or without the package.
    """
    installed = fused_layers.is_installed()
    if choice == "on" and device.type != "cuda":
        raise RecipeError(
            "train.liger=on: Liger's kernels run on CUDA devices, and this machine has none; set it to auto"
        )
    if choice == "on" and not installed:
        raise RecipeError("train.liger=on needs liger-kernel; `pip install liger-kernel`, or set it to auto")
    return choice != "off" and installed and device.type == "cuda"


def fuse_layers(model: PreTrainedModel, choice: Choice, device: torch.device) -> str:
    """Install Liger's kernels in the decoder layers of a sparsified model in place, as
    :func:`sparsetrain.modeling.fused_layers.fuse` does.

    Returns:
        A sentence that describes the fused kernels.

    Raises:
        ModelError: Liger cannot be imported; or ``choice`` is ``on`` and Liger does not support the model or a kernel's
            result differs.
    """
    try:
        return fused_layers.fuse(model, device, whole=choice == "on")
    except fused_layers.UnknownFamily as error:
        if choice == "on":
            raise ModelError(f"train.liger=on: {error}; set it to auto") from error
        return f"{error}; nothing is fused in its layers"
    except fused_layers.VersionsDiffer as error:
        raise ModelError(f"train.liger: {error}; install another version of liger-kernel, or set it to off") from error
    except fused_layers.ResultsDiffer as error:
        raise ModelError(f"train.liger=on: {error}; set it to auto, which leaves such modules as they are") from error


def can_fuse_loss(model: PreTrainedModel) -> bool:
    """Whether :func:`fuse_loss` computes this model's loss: logits that are a plain linear map, and no fp16.

    In fp16 the kernel would form the logits' gradient before DeepSpeed scales the loss, where small ones are lost.
    """
    head = model.get_output_embeddings()
    if any(layer is head for _, layer in layers_with_rows(model)):
        return False  # the kernel would not see rows that are trained beside the weight
    return has_plain_head(model) and type(head) is nn.Linear and head.weight.dtype != torch.float16


def fuse_loss(head: Any) -> None:
    """Make an output projection return the summed NLL of ``targets`` if it is called with targets.

    The loss must be computed inside the projection's forward, because under ZeRO-3 its weight exists only there.
    """
    head.forward = MethodType(_project, head)


def _project(head: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
    if targets is None:
        return F.linear(hidden, head.weight, head.bias)
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    # Accumulate in fp32, because the gradient of the weight is a sum over all chunks. The other values are defaults.
    options = (None, IGNORE, 0.0, 0.0, "sum", None, False, torch.float32)
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, head.weight, targets, head.bias, *options)[0]
