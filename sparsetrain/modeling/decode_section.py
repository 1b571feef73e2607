"""Puts a decode section into a sparsified model, and its record beside that of the attention method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from sparsetrain.errors import ModelError
from sparsetrain.generation.composition import attention_kind, check_composition
from sparsetrain.generation.settings import Decode, parse_decode
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.layers import put_method, sparse_layers
from sparsetrain.modeling.records import DECODE

Model = TypeVar("Model", bound=nn.Module)


def set_decode(model: Model, decode: str | Mapping[str, Any] | Decode | None) -> Model:
    """Choose what the layers with full attention read in a step of generation, in place.

    Prompts, training and evaluation in one pass stay as they are. A cache that was filled before keeps its way.

    Args:
        model: gone through :func:`~sparsetrain.sparsify` or :func:`~sparsetrain.load`; ``{"method": "full"}`` for a
            model as it came.
        decode: the section, such as ``{"select": "quest", "prune": {"p": 0.9}}``; the name of published settings
            (:data:`~sparsetrain.generation.settings.PUBLISHED`); or None to read all keys again.

    Returns:
        The same model.

    Raises:
        ModelError: a field is wrong, the model was not sparsified, or none of its layers can take the section.
    """
    layers = sparse_layers(model)
    if not layers:
        name = type(model).__name__
        raise ModelError(
            f'{name} has no attention method; call sparsetrain.sparsify(model, {{"method": "full"}}) first'
        )
    plans: dict[int, LayerPlan] = {index: getattr(module, PLAN_ATTRIBUTE) for index, module, _ in layers}
    section = None if decode is None else parse_decode(decode)
    taken: list[int] = []
    if section is not None:
        kinds = ((index, attention_kind(plan.method, plan.window)) for index, plan in plans.items())
        taken = check_composition(kinds, section)
    for index, module, _ in layers:
        put_method(module, replace(plans[index], decode=section if index in taken else None))
    record: dict[str, Any] = model.config.sparsetrain  # type: ignore[assignment, union-attr]
    record.pop(DECODE, None)
    if section is not None:
        record[DECODE] = section.model_dump(mode="json")
    return model
