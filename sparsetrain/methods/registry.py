"""The methods there are: ours, one line each, and those of installed packages. Importing it loads no torch."""

from __future__ import annotations

import difflib
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
from sparsetrain.methods.sliding import SlidingConfig
from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.methods.stride import StrideConfig

CONFIGS: tuple[type[MethodConfig], ...] = (
    FullConfig,
    PowerConfig,
    SlidingConfig,
    StrideConfig,
    DilatedConfig,
    LongNetConfig,
    SparseKConfig,
)
"""A new method of ours is a file beside this one and a line here."""

METHODS: dict[str, type[MethodConfig]] = {config.model_fields["method"].default: config for config in CONFIGS}
"""The config of each of our methods by name."""


def method_names() -> list[str]:
    """All names that ``attention.method`` may have, of installed packages too, which are not imported for this."""
    return list(dict.fromkeys((*METHODS, *INSTALLED.entries)))


def find_config(name: str) -> type[MethodConfig]:
    """The config of a method.

    Raises:
        ModelError: there is none of that name, or its package cannot be used.
    """
    if name in INSTALLED.entries:
        return INSTALLED.load(name, tuple(METHODS))
    if name not in METHODS:
        raise ModelError(f"attention.method: {_unknown(name, method_names())}")
    return METHODS[name]


def config_or_none(name: Any) -> type[MethodConfig] | None:
    """:func:`find_config`, None where that raises, and for what is no name."""
    if not isinstance(name, str) or name not in method_names():
        return None
    try:
        return find_config(name)
    except ModelError:
        return None


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
    if not isinstance(method, str):
        raise ModelError(f"attention.method: {_unknown(method, method_names())}")
    config = find_config(method)
    try:
        if strict:
            return config.model_validate_json(json.dumps(dict(attention)), strict=True)
        return config.model_validate(dict(attention))
    except ValidationError as error:
        problems = "; ".join(_explain(problem, config) for problem in error.errors())
        raise ModelError(f"attention (method {method}): {problems}") from None


class _AnyMethod:
    """Validates a section by the config that its ``method`` names.

    Ours are a tagged union. Everything else has one tag: an installed package's method, imported on this occasion, or
    what there is no config for.
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
    def _plain(config: MethodConfig) -> dict[str, Any]:
        return config.model_dump(mode="json")

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
"""The ``attention`` section of a recipe: the field ``method`` decides which of the configs it is."""


def _explain(problem: Any, config: type[MethodConfig]) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(field, list(config.model_fields))
    if not field:
        return str(problem["ctx"]["error"])
    return f"{field}={problem['input']!r}: {problem['msg']}"


def _unknown(name: object, known: list[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    guess = f", did you mean {nearest[0]}?" if nearest else "."
    return f"there is no {name!r}{guess} Choose from {', '.join(known)}"
