"""The methods there are. A new method is a file beside this one and a line here; importing it loads no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.dilated import DilatedConfig
from sparsetrain.methods.full import FullConfig
from sparsetrain.methods.longnet import LongNetConfig
from sparsetrain.methods.power import PowerConfig
from sparsetrain.methods.sliding import SlidingConfig
from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.methods.stride import StrideConfig

AttentionConfig = Annotated[
    FullConfig | PowerConfig | SlidingConfig | StrideConfig | DilatedConfig | LongNetConfig | SparseKConfig,
    Field(discriminator="method"),
]
"""The ``attention`` section of a recipe: the field ``method`` decides which of the configs it is."""

METHODS: dict[str, type[MethodConfig]] = {
    "full": FullConfig,
    "power": PowerConfig,
    "sliding": SlidingConfig,
    "stride": StrideConfig,
    "dilated": DilatedConfig,
    "longnet": LongNetConfig,
    "sparsek": SparseKConfig,
}
"""The config of each method by name."""


def parse_attention(attention: Mapping[str, Any] | MethodConfig, *, strict: bool = False) -> MethodConfig:
    """The typed config of an ``attention`` mapping such as ``{"method": "power", "block": 256}``.

    Args:
        strict: take values as JSON has them: ``"4"`` is no number, and ``true`` is not 1.

    Raises:
        ModelError: no method, an unknown one, or a parameter that is unknown or out of range.
    """
    if isinstance(attention, MethodConfig):
        return attention
    if not isinstance(attention, Mapping):
        raise ModelError(f"attention={attention!r} is no mapping such as {{'method': 'power', 'block': 256}}")
    method = attention.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ModelError(f"attention.method: {_unknown(method, METHODS)}")
    config = METHODS[method]
    try:
        if strict:
            return config.model_validate_json(json.dumps(dict(attention)), strict=True)
        return config.model_validate(dict(attention))
    except ValidationError as error:
        problems = "; ".join(_explain(problem, config) for problem in error.errors())
        raise ModelError(f"attention (method {method}): {problems}") from None


def _explain(problem: Any, config: type[MethodConfig]) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(field, config.model_fields)
    if not field:
        return str(problem["ctx"]["error"])
    return f"{field}={problem['input']!r}: {problem['msg']}"


def _unknown(name: object, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    guess = f", did you mean {nearest[0]}?" if nearest else "."
    return f"there is no {name!r}{guess} Choose from {', '.join(known)}"
