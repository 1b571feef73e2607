"""The rows of an evaluation: one model with several attention methods and decode settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import ModelError
from sparsetrain.generation.setting_text import NONE, decode_section, split_setting
from sparsetrain.generation.settings import Decode, parse_decode
from sparsetrain.methods.registry import method_names, parse_attention
from sparsetrain.recipe.yaml_source import parse_yaml

if TYPE_CHECKING:
    from sparsetrain.methods.base import MethodConfig

TRAINED, DENSE, RECORDED = "trained", "dense", "recorded"

OTHERWISE = ": "
"""In labels of a run: behind it is in what other way the trained model was measured, as in ``power, after: dense``."""


@dataclass(frozen=True)
class Attention:
    """An attention method of a row."""

    label: str
    config: MethodConfig | None
    """None for what the model records."""


@dataclass(frozen=True)
class Decoding:
    """A decode setting of a row."""

    label: str
    section: Decode | None = None
    """None to read all keys."""
    recorded: bool = False
    """Whether it is what the model records."""


@dataclass(frozen=True)
class Row:
    """A model as it is measured."""

    attention: Attention
    decoding: Decoding

    @property
    def label(self) -> str:
        """What tells it from other rows of the model."""
        return self.attention.label if self.decoding.recorded else f"{self.attention.label}, {self.decoding.label}"


def read_attention(given: str | Mapping[str, Any], called: str = "--attention", also: str = "") -> Attention:
    """An attention method of a row: ``trained``, ``dense``, a method, or its fields.

    Args:
        called: the option or field, for messages.
        also: what else may be given there, for the message.

    Raises:
        ModelError, RecipeError: there is no such method, or a field is wrong.
    """
    if isinstance(given, Mapping):
        return _with_fields(given)
    text = given
    if text == TRAINED:
        return Attention(TRAINED, None)
    if text == DENSE:
        return Attention(DENSE, parse_attention({"method": "full"}))
    if text.startswith("{"):
        return _with_fields(parse_yaml(text, f"{called} {text}", number_lines=False).data)
    if text in method_names():
        return Attention(text, parse_attention({"method": text}))
    raise ModelError(
        f"{called} {text} is not known; give {TRAINED}, {DENSE}, a method ({', '.join(method_names())}), its fields "
        f"such as '{{method: power, block: 64}}'{also}"
    )


def _with_fields(given: Mapping[str, Any]) -> Attention:
    config = parse_attention(given, strict=True)
    changed = config.model_dump(mode="json", exclude_defaults=True, exclude={"method"})
    fields = " ".join(f"{name}={value}" for name, value in changed.items())
    return Attention(f"{config.method} {fields}".strip(), config)


def read_decoding(text: str, called: str = "--decode", read: Callable[[str], Decode] = parse_decode) -> Decoding:
    """A decode setting of a row: ``none``, ``recorded``, or a name with fields behind it.

    Args:
        called: the option or field, for messages.
        read: reads a name; a command reads files as well.

    Raises:
        ModelError, RecipeError: the name is not known, or a field is wrong.
    """
    if text == RECORDED:
        return Decoding(text, recorded=True)
    name, fields = split_setting(called, text)
    section = decode_section(name, fields, read)
    return Decoding(NONE if name == NONE else text, parse_decode(section) if section else None)
