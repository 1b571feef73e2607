"""A recipe that is named where a run or a model is wanted."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.loading import load_recipe
from sparsetrain.recipe.shipped import shipped_recipes


def is_recipe_instead(name: str) -> str | None:
    """What to say of a recipe's name or file where a run or a model is wanted; None if it is no recipe."""
    file = name.endswith((".yaml", ".yml")) and os.path.isfile(name)
    if not file and (name not in shipped_recipes() or os.path.exists(name)):
        return None
    try:
        folder = Path(load_recipe(name).recipe.output or "")
    except RecipeError:
        return f"{name} is a recipe; run it first (sparsetrain run {shlex.quote(name)}), then name its run folder"
    if (folder / "recipe.yaml").is_file():
        return f"{name} is a recipe; name its run: {folder}"
    return f"{name} is a recipe; run it first (sparsetrain run {shlex.quote(name)}), then name its run folder, {folder}"
