"""Bases that are stored quantised. Training and merging take place in full precision, so they are unpacked as they are
loaded; what is saved afterwards is an ordinary model, and says so.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from sparsetrain.errors import ModelError
from sparsetrain.modeling.boundary import words

FIELD = "quantization_config"

FULL_PRECISION = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

PACKING = (
    "_scale",
    "_scales",
    "_scale_inv",
    "_zero_point",
    "qweight",
    "qzeros",
    "g_idx",
    "absmax",
    "quant_map",
    "_blocks",
    "_packed",
    ".SCB",
)
"""How the names of tensors end that stand beside packed weights."""

SCALES_OF_TILES = "_scale_inv"
"""How the name of FP8 weights goes on in the name of the scales of their tiles."""

OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", ".q_scale", ".k_scale", ".v_scale")
"""How the names of scales end that belong to activations and caches."""


def unpack_when_loaded(config: Any, what: str) -> bool:
    """Have transformers unpack the weights of a quantised checkpoint as it reads them.

    Args:
        config: the model's, which is changed.
        what: what to call the model in an error.

    Returns:
        Whether they are packed; :func:`finish_unpacking` is due once they are loaded.

    Raises:
        ModelError: transformers cannot unpack weights of this kind.
    """
    packed = False
    for owner in (config, config.get_text_config(decoder=True)):
        stored = getattr(owner, FIELD, None)
        if stored is None:
            continue
        packed = True
        fields = stored.to_dict() if hasattr(stored, "to_dict") else stored
        if not isinstance(fields, dict):
            raise ModelError(f"{what}: {FIELD}={stored!r:.100} of its config.json is no mapping")
        method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
        if fields.get("load_in_4bit") or fields.get("load_in_8bit") or method.startswith("bitsandbytes"):
            _check_installed(fields, method, what)
            continue  # unpacked once it is loaded
        kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if kind is None or "dequantize" not in inspect.signature(kind).parameters:
            raise ModelError(
                f"{what} is quantised by {method}, which can be neither trained nor unpacked; give the model that it "
                "was made from"
            )
        fields = {**fields, "dequantize": True}
        _check_installed(fields, method, what)
        setattr(owner, FIELD, fields)
    return packed


def _check_installed(fields: Mapping[str, Any], method: str, what: str) -> None:
    """Refuse packed weights whose library is missing. What else their quantiser dislikes is told when they are read,
    maybe on another machine."""
    try:
        quantizer: Any = AutoHfQuantizer.from_config(copy.deepcopy(dict(fields)), pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except ImportError as error:
        raise ModelError(f"{what} is quantised by {method}: {words(error)}") from error
    except Exception:
        return


def finish_unpacking(model: PreTrainedModel, what: str) -> PreTrainedModel:
    """The model that :func:`unpack_when_loaded` was for, in full precision and to be saved as an ordinary one.

    Raises:
        ModelError: weights are still packed.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        loaded: Any = model
        model = loaded.dequantize()
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FULL_PRECISION:
            raise ModelError(f"{what}: {name} is stored as {parameter.dtype}, and could not be unpacked")
    _cast(model, model.dtype if model.config.dtype is None else model.config.dtype)
    # Transformers keeps how it read the weights, to write them so again, and would write full weights as scales.
    read: list[Any] = getattr(model, "_weight_conversions", None) or []
    prefixes = {str(one) for one in read if isinstance(one, PrefixChange)}
    plain = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [  # type: ignore[assignment]
        one for one in plain if not isinstance(one, PrefixChange) or str(one) in prefixes
    ]
    return model


def _cast(model: PreTrainedModel, dtype: Any) -> None:
    """Bring what stood unpacked in a packed checkpoint, and was read as it was, to the dtype asked for."""
    kept = (*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ()))
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def check_packed(config: Any, shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Refuse weights that are not packed as the config says: plain ones, and FP8 weights that their tiles do not
    divide.

    Args:
        config: the model's.
        shapes: of the tensors that the checkpoint holds, by name.
        what: what to call the model in an error.

    Raises:
        ModelError: names the field, or a weight that ends within a tile.
    """
    if not any(name.endswith(PACKING) for name in shapes):
        raise ModelError(
            f"{what}: its config.json says that weights are packed ({FIELD}), and the files hold plain ones, without "
            f"scales; take {FIELD} out of config.json"
        )
    _check_tiles(config, shapes, what)


def _check_tiles(config: Any, shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Refuse FP8 weights that their tiles do not divide. transformers takes the size of a tile from the number of
    scales, and would give some of the weights the scale of their neighbours.
    """
    stored: Any = getattr(config, FIELD, None)
    fields = stored.to_dict() if hasattr(stored, "to_dict") else stored or {}
    tile = fields.get("weight_block_size")
    if not isinstance(tile, list | tuple) or len(tile) != 2:
        return
    for name in sorted(shapes):
        scales, weight = shapes[name], shapes.get(name.removesuffix(SCALES_OF_TILES))
        if not name.endswith(SCALES_OF_TILES) or weight is None or len(weight) < 2 or len(scales) < 2:
            continue
        for rows, size, count in zip(weight[-2:], tile, scales[-2:]):
            if count > 1 and count == -(-rows // size) and rows % size:
                raise ModelError(
                    f"{what} holds FP8 weights that end within a tile of {list(tile)} "
                    f"({name.removesuffix(SCALES_OF_TILES)} is {list(weight)}), which transformers unpacks with the "
                    "wrong scales; give the model that it was made from"
                )


def without_scales(unexpected: Iterable[str], what: str) -> list[str]:
    """The tensors of a checkpoint that a model has no place for, but for scales of activations, which full precision
    does not need. A scale of weights among them means that packed weights were read as they are.

    Args:
        unexpected: the names of those tensors.
        what: what to call the model in an error.

    Raises:
        ModelError: names that scale.
    """
    left = [name for name in unexpected if not name.endswith(OF_ACTIVATIONS)]
    packed = sorted(name for name in left if name.endswith(PACKING))
    if packed:
        raise ModelError(
            f"{what} holds packed weights ({packed[0]}) in another form than its config.json tells of; restore its "
            f"{FIELD}, or give the model that it was made from"
        )
    return left
