"""What ``sparsetrain eval --attention`` and ``--decode`` are given: a recipe's words, and recipes and files too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from sparsetrain.errors import ModelError
from sparsetrain.methods.registry import method_names
from sparsetrain.recipe import load_recipe, rows
from sparsetrain.recipe.decode_file import read_decode
from sparsetrain.recipe.rows import DENSE, TRAINED, Attention, Decoding
from sparsetrain.recipe.shipped import shipped_recipes

T = TypeVar("T")


def read_attention(text: str) -> Attention:
    """What ``--attention`` was given: ``trained``, ``dense``, a method, its fields, or the recipe that has them.

    Raises:
        ModelError, RecipeError: there is no such method or recipe, or a field is wrong.
    """
    known = text.startswith("{") or text in (TRAINED, DENSE, *method_names())
    if not known and (Path(text).is_file() or text in shipped_recipes()):
        recipe = load_recipe(text).recipe
        return Attention(f"{recipe.attention.method} of {recipe.name}", recipe.attention)
    return rows.read_attention(text, also=", or a recipe that has them")


def read_decoding(text: str) -> Decoding:
    """What ``--decode`` was given: ``none``, ``recorded``, or a name or a file with fields behind it.

    Raises:
        ModelError, RecipeError: the name is not known, or a field is wrong.
    """
    return rows.read_decoding(text, read=read_decode)


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
