"""The rows of an evaluation: one model with several attention methods and decode settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsetrain.errors import ModelError
from sparsetrain.methods.registry import method_names, parse_attention
from sparsetrain.recipe.yaml_source import parse_yaml

if TYPE_CHECKING:
    from sparsetrain.generation.settings import Decode
    from sparsetrain.methods.base import MethodConfig

TRAINED, DENSE, RECORDED, NONE = "trained", "dense", "recorded", "none"

T = TypeVar("T")


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


def read_attention(text: str) -> Attention:
    """What ``--attention`` was given: ``trained``, ``dense``, a method, its fields, or the recipe that has them.

    Raises:
        ModelError, RecipeError: there is no such method or recipe, or a field is wrong.
    """
    if text == TRAINED:
        return Attention(TRAINED, None)
    if text == DENSE:
        return Attention(DENSE, parse_attention({"method": "full"}))
    if text.startswith("{"):
        config = parse_attention(parse_yaml(text, f"--attention {text}", number_lines=False).data, strict=True)
        given = config.model_dump(mode="json", exclude_defaults=True, exclude={"method"})
        fields = " ".join(f"{name}={value}" for name, value in given.items())
        return Attention(f"{config.method} {fields}".strip(), config)
    if text in method_names():
        return Attention(text, parse_attention({"method": text}))
    from sparsetrain.recipe import load_recipe
    from sparsetrain.recipe.shipped import shipped_recipes

    if Path(text).is_file() or text in shipped_recipes():
        recipe = load_recipe(text).recipe
        return Attention(f"{recipe.attention.method} of {recipe.name}", recipe.attention)
    raise ModelError(
        f"--attention {text} is not known; give {TRAINED}, {DENSE}, a method ({', '.join(method_names())}), its fields "
        "such as '{method: power, block: 64}', or a recipe that has them"
    )


def apart(flag: str, rows: Sequence[T]) -> Sequence[T]:
    """The same rows.

    Raises:
        ModelError: two have one label.
    """
    labels: list[Any] = [row.label for row in rows]  # type: ignore[attr-defined]
    for label in labels:
        if labels.count(label) > 1:
            raise ModelError(f"{flag} has {label} twice; give it once")
    return rows
