"""Puts a decode section into a sparsified model, and its record beside that of the attention method."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sparsetrain.errors import ModelError
from sparsetrain.generation.composition import LEARNED, attention_kind, check_composition, check_own
from sparsetrain.generation.settings import Calibrated, Decode
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.layers import put_method, sparse_layers
from sparsetrain.modeling.records import DECODE, differences, identity
from sparsetrain.recipe.decode_file import read_decode

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def set_decode(model: Model, decode: str | Path | Mapping[str, Any] | Decode | None) -> Model:
    """Choose what the layers with full attention read in a step of generation, in place.

    Prompts, training and evaluation in one pass stay as they are. A cache that was filled before is refused, and a
    later :func:`~sparsetrain.sparsify` drops the section.

    Args:
        model: gone through :func:`~sparsetrain.sparsify` or :func:`~sparsetrain.load`; ``{"method": "full"}`` for a
            model as it came.
        decode: the section, such as ``{"select": "quest", "prune": {"p": 0.9}}``; the name of published settings
            (:data:`~sparsetrain.generation.settings.PUBLISHED`); a file of ``sparsetrain calibrate``; or None to read
            all keys again.

    Returns:
        The same model.

    Raises:
        ModelError: a field is wrong, the model was not sparsified, none of its layers can take the section, or it was
            calibrated on another model.
    """
    layers = sparse_layers(model)
    if not layers:
        name = type(model).__name__
        raise ModelError(
            f'{name} has no attention method; call sparsetrain.sparsify(model, {{"method": "full"}}) first'
        )
    plans: dict[int, LayerPlan] = {index: getattr(module, PLAN_ATTRIBUTE) for index, module, _ in layers}
    section = None if decode is None else read_decode(decode)
    taken: list[int] = []
    if section is not None:
        if section.calibrated is not None:
            _check_same_model(section.calibrated, model)
        kinds = {index: attention_kind(plan.method, plan.window) for index, plan in plans.items()}
        taken = check_composition(kinds.items(), section)
        for index in taken if section.select == "own" else ():
            check_own(index, plans[index].method)
        # Said once: commands check a section on a model without weights first.
        if any(kinds[index] == LEARNED for index in taken) and not _is_outline(model):
            logger.warning(
                "decode.select=own with sparsek is for measurement: each step estimates the few keys that are left "
                "anew, so it is slower than without"
            )
    # A method's modules are then without weights too.
    with torch.device("meta") if _is_outline(model) else nullcontext():
        for index, module, _ in layers:
            put_method(module, replace(plans[index], decode=section if index in taken else None))
    record: dict[str, Any] = model.config.sparsetrain  # type: ignore[assignment, union-attr]
    record.pop(DECODE, None)
    if section is not None:
        # Of this model from here on, whatever its config becomes.
        record[DECODE] = section.model_dump(mode="json", exclude={"calibrated"})
    return model


def restore_decode(model: Model, recorded: Decode | None) -> Model:
    """Put a recorded section into a model that :func:`~sparsetrain.sparsify` has given its method again, in place.

    Args:
        recorded: None where the record has none; a section of the method's own is then taken out.
    """
    record: dict[str, Any] = model.config.sparsetrain  # type: ignore[assignment, union-attr]
    return model if recorded is None and DECODE not in record else set_decode(model, recorded)


def _is_outline(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def _check_same_model(calibrated: Calibrated, model: Any) -> None:
    if faults := differences(calibrated.model, identity(model.config)):
        name = getattr(model.config, "_name_or_path", None) or type(model).__name__
        raise ModelError(
            f"decode was calibrated on {calibrated.name}, and {name} is another model: {', '.join(faults)}; run "
            "sparsetrain calibrate on it, or drop decode.calibrated if its p are meant for this model"
        )
