"""Unpack quantised base models when they are loaded.

Training and merging use full precision, and the model is saved as an ordinary, unquantised one.
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
"""Suffixes of the names of tensors that accompany packed weights, such as scales."""

SCALES_OF_TILES = "_scale_inv"
"""Suffix that makes the name of FP8 weights the name of their tile scales."""

OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", ".q_scale", ".k_scale", ".v_scale")
"""Suffixes of the names of scales for activations and caches."""


def unpack_when_loaded(config: Any, what: str) -> bool:
    """Configure transformers to unpack the weights of a quantised checkpoint while it reads them.

    Args:
        config: The model's config, which is changed in place.
        what: The name of the model in error messages.

    Returns:
        Whether the weights are packed; then call :func:`finish_unpacking` after loading.

    Raises:
        ModelError: Transformers cannot unpack this kind of quantisation.
    """
    packed = False
    for owner in (config, config.get_text_config(decoder=True)):
        stored = getattr(owner, FIELD, None)
        if stored is None:
            continue
        packed = True
        fields = stored.to_dict() if hasattr(stored, "to_dict") else stored
        if not isinstance(fields, dict):
            raise ModelError(f"{what}: {FIELD}={stored!r:.100} of its config.json is not a mapping")
        method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
        if fields.get("load_in_4bit") or fields.get("load_in_8bit") or method.startswith("bitsandbytes"):
            _check_installed(fields, method, what)
            continue  # unpacked after loading
        kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if kind is None or "dequantize" not in inspect.signature(kind).parameters:
            raise ModelError(
                f"{what} is quantised by {method}, which can be neither trained nor unpacked; use the original "
                "unquantised model"
            )
        fields = {**fields, "dequantize": True}
        _check_installed(fields, method, what)
        setattr(owner, FIELD, fields)
    return packed


def _check_installed(fields: Mapping[str, Any], method: str, what: str) -> None:
    """Refuse packed weights if their library is not installed. Other requirements of the quantiser are checked when the
    weights are read, which may be on another machine."""
    try:
        quantizer: Any = AutoHfQuantizer.from_config(copy.deepcopy(dict(fields)), pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except ImportError as error:
        raise ModelError(f"{what} is quantised by {method}: {words(error)}") from error
    except Exception:
        return


def finish_unpacking(model: PreTrainedModel, what: str) -> PreTrainedModel:
    """Finish what :func:`unpack_when_loaded` began: the model in full precision, to be saved as an ordinary one.

    Raises:
        ModelError: Some weights are still packed.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        loaded: Any = model
        model = loaded.dequantize()
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FULL_PRECISION:
            raise ModelError(f"{what}: {name} is stored as {parameter.dtype}, and could not be unpacked")
    _cast(model, model.dtype if model.config.dtype is None else model.config.dtype)
    # Transformers keeps the conversions used in reading and would apply them in writing, to weights that are unpacked.
    read: list[Any] = getattr(model, "_weight_conversions", None) or []
    prefixes = {str(one) for one in read if isinstance(one, PrefixChange)}
    plain = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [  # type: ignore[assignment]
        one for one in plain if not isinstance(one, PrefixChange) or str(one) in prefixes
    ]
    return model


def _cast(model: PreTrainedModel, dtype: Any) -> None:
    """Cast the tensors that were stored unpacked in a packed checkpoint to the requested dtype."""
    kept = (*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ()))
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def check_packed(config: Any, shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Refuse weights that are not packed as the config says: unpacked weights, and FP8 weights of incomplete tiles.

    Args:
        config: The model's config.
        shapes: The shapes of the checkpoint's tensors, by name.
        what: The name of the model in error messages.

    Raises:
        ModelError: The weights are refused; names the field, or a weight that ends within a tile.
    """
    if not any(name.endswith(PACKING) for name in shapes):
        raise ModelError(
            f"{what}: its config.json says that weights are packed ({FIELD}), but the files hold unpacked ones, "
            f"without scales; remove {FIELD} from config.json"
        )
    _check_tiles(config, shapes, what)


def _check_tiles(config: Any, shapes: Mapping[str, Sequence[int]], what: str) -> None:
    """Refuse FP8 weights whose shape is not a multiple of the tile.

    Transformers derives the tile size from the number of scales, and would apply wrong scales near the borders.
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
                    "wrong scales; use the original unquantised model"
                )


def without_scales(unexpected: Iterable[str], what: str) -> list[str]:
    """Filter the unexpected tensors of a checkpoint: scales of activations are dropped, as full precision has no use
    for them.

    Args:
        unexpected: The names of tensors that the model does not have.
        what: The name of the model in error messages.

    Raises:
        ModelError: A scale of weights is among them, so packed weights were read without unpacking; names it.
    """
    left = [name for name in unexpected if not name.endswith(OF_ACTIVATIONS)]
    packed = sorted(name for name in left if name.endswith(PACKING))
    if packed:
        raise ModelError(
            f"{what} holds packed weights ({packed[0]}) in another format than its config.json says; restore its "
            f"{FIELD}, or use the original unquantised model"
        )
    return left
