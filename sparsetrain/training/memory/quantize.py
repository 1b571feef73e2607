"""The frozen matrices of a LoRA run in 4 or 8 bits, by bitsandbytes (QLoRA, 2305.14314)."""

from __future__ import annotations

from importlib import util
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.errors import RecipeError
from sparsetrain.modeling.layers import new_modules

Bits = Literal["none", "4bit", "8bit"]


def check_quantization(bits: Bits, device: torch.device) -> None:
    """Refuse quantisation on a machine that does not support it, before models and data are loaded.

    Raises:
        RecipeError: bitsandbytes is not installed, or there is no CUDA device.
    """
    if bits == "none":
        return
    if device.type != "cuda":
        raise RecipeError(
            f"lora.quantize_base={bits}: bitsandbytes computes on CUDA devices, and this machine has none; "
            "set it to none"
        )
    if util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"lora.quantize_base={bits} needs bitsandbytes; `pip install sparsetrain[quantize]`, or set it to none"
        )


def quantize_base(model: PreTrainedModel, bits: Bits) -> None:
    """Replace the linear layers of the decoder in place by layers that are quantised when they move to a CUDA device.

    The output head and the modules that the attention method adds keep their precision.
    """
    if bits == "none":
        return
    added = {id(inner) for new in new_modules(model).values() for inner in new.modules()}
    inside = {id(inner) for inner in model.get_decoder().modules()} - added
    for name, layer in list(model.named_modules()):
        if id(layer) in inside and type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantized(layer, bits))
    # peft selects its adapter classes by this.
    setattr(model, f"is_loaded_in_{bits}", True)


def _quantized(layer: nn.Linear, bits: Bits) -> nn.Module:
    import bitsandbytes as bnb

    weight = layer.weight.detach()
    shape: dict[str, Any] = {
        "input_features": layer.in_features,
        "output_features": layer.out_features,
        "bias": layer.bias is not None,
    }
    new: Any
    if bits == "4bit":
        new = bnb.nn.Linear4bit(**shape, compute_dtype=weight.dtype, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new
