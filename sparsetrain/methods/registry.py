"""The registry of attention methods: ours, one line each, and those of installed packages. It does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.dilated import DilatedConfig
from sparsetrain.methods.full import FullConfig
from sparsetrain.methods.installed import INSTALLED
from sparsetrain.methods.longnet import LongNetConfig
from sparsetrain.methods.power import PowerConfig
from sparsetrain.methods.recycled.method import RecycledConfig
from sparsetrain.methods.ruler import RulerConfig
from sparsetrain.methods.sliding import SlidingConfig
from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.methods.stride import StrideConfig
from sparsetrain.nearest import did_you_mean

CONFIGS: tuple[type[MethodConfig], ...] = (
    FullConfig,
    PowerConfig,
    SlidingConfig,
    StrideConfig,
    DilatedConfig,
    LongNetConfig,
    RulerConfig,
    SparseKConfig,
    RecycledConfig,
)
"""The configs of our methods. A new method is a file or folder here and a line in this tuple."""

METHODS: dict[str, type[MethodConfig]] = {config.model_fields["method"].default: config for config in CONFIGS}
"""The config of each of our methods by name."""


def method_names() -> list[str]:
    """All valid values of ``attention.method``, including those of installed packages, which are not imported."""
    return list(dict.fromkeys((*METHODS, *INSTALLED.entries)))


def find_config(name: str) -> type[MethodConfig]:
    """The config class of a method.

    Raises:
        ModelError: There is no such method, or its package cannot be used.
    """
    if name in INSTALLED.entries:
        return INSTALLED.load(name, tuple(METHODS))
    if name not in METHODS:
        raise ModelError(f"attention.method: {_unknown(name, method_names())}")
    return METHODS[name]


def config_or_none(name: Any) -> type[MethodConfig] | None:
    """:func:`find_config`, but None if that raises or ``name`` is not a string."""
    if not isinstance(name, str) or name not in method_names():
        return None
    try:
        return find_config(name)
    except ModelError:
        return None


def parse_attention(attention: Mapping[str, Any] | MethodConfig, *, strict: bool = False) -> MethodConfig:
    """The typed config of an ``attention`` mapping such as ``{"method": "power", "block": 256}``.

    Args:
        strict: Do not convert types: ``"4"`` is not a number, and ``true`` is not 1.

    Raises:
        ModelError: The method is missing or unknown, or a parameter is unknown or out of range.
    """
    if isinstance(attention, MethodConfig):
        return attention
    if not isinstance(attention, Mapping):
        raise ModelError(f"attention={attention!r} is not a mapping such as {{'method': 'power', 'block': 256}}")
    method = attention.get("method")
    if not isinstance(method, str):
        raise ModelError(f"attention.method: {_unknown(method, method_names())}")
    config = find_config(method)
    try:
        if strict:
            return config.model_validate_json(json.dumps(dict(attention)), strict=True)
        return config.model_validate(dict(attention))
    except ValidationError as error:
        problems = "; ".join(_explain(problem, config, attention) for problem in error.errors())
        raise ModelError(f"attention (method {method}): {problems}") from None


class _AnyMethod:
    """Validates an ``attention`` section with the config class of its ``method``.

    Our methods are a tagged union. All other values share one tag: methods of installed packages, which are imported
    here, and unknown methods.
    """

    ELSE = "another method"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        other = core_schema.with_info_plain_validator_function(
            cls._validate_other,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config: config.model_dump(mode="json")
            ),
        )
        own = {name: handler.generate_schema(config) for name, config in METHODS.items()}
        return core_schema.tagged_union_schema({**own, cls.ELSE: other}, discriminator=cls._tag)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices: dict[Any, CoreSchema] = {
            name: config.__pydantic_core_schema__
            for name in method_names()
            if (config := config_or_none(name)) is not None
        }
        return handler(core_schema.tagged_union_schema(choices, discriminator="method"))

    @classmethod
    def _tag(cls, value: Any) -> str:
        method = value.get("method") if isinstance(value, Mapping) else getattr(value, "method", None)
        return method if isinstance(method, str) and method in METHODS and method not in INSTALLED.entries else cls.ELSE

    @staticmethod
    def _validate_other(value: Any, info: core_schema.ValidationInfo) -> MethodConfig:
        if isinstance(value, MethodConfig):
            return value
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_attributes_type")
        method = value.get("method")
        if "method" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'method'"})
        names = method_names()
        if method not in names:
            expected = ", ".join(repr(name) for name in names)
            known = {"discriminator": "'method'", "tag": str(method), "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", known)
        try:
            config = find_config(method)
        except ModelError as error:
            raise PydanticCustomError("section_unusable", "{fault}", {"fault": str(error), "key": "method"}) from None
        if info.mode == "json":
            return config.model_validate_json(json.dumps(value), strict=True)
        return config.model_validate(value)


AttentionConfig = Annotated[MethodConfig, _AnyMethod]
"""The ``attention`` section of a recipe; its field ``method`` selects the config class."""


def _explain(problem: Any, config: type[MethodConfig], given: Any) -> str:
    names = []
    for part in problem["loc"]:  # leaves out pydantic's names for the alternatives of a union
        if (isinstance(given, Mapping) and part in given) or (isinstance(given, list) and isinstance(part, int)):
            given = given[part]
            names.append(str(part))
    if problem["type"] == "missing":
        names.append(str(problem["loc"][-1]))
    field = ".".join(names)
    if problem["type"] == "extra_forbidden":
        return _unknown(field, list(config.model_fields))
    if not field:
        return str(problem["ctx"]["error"])
    return f"{field}={problem['input']!r}: {problem['msg']}"


def _unknown(name: object, known: list[str]) -> str:
    guess = did_you_mean(name, known, ", {}", otherwise=".")
    return f"there is no {name!r}{guess} Choose from {', '.join(known)}"
