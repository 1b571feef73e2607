"""The recipes that come with the package, and how a recipe is found by path or name."""

from __future__ import annotations

import os
from importlib import resources, util
from pathlib import Path

from sparsetrain.errors import RecipeError
from sparsetrain.nearest import did_you_mean

LONGEST_NAME = 255
"""Maximum number of characters of a name that errors repeat and compare with shipped recipes."""


def recipes_folder() -> Path:
    """The folder of the shipped recipes: the package ``sparsetrain.recipes``, or ``recipes/`` of the source tree."""
    if util.find_spec("sparsetrain.recipes") is not None:
        return Path(str(resources.files("sparsetrain.recipes")))
    return Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped recipe.

    Raises:
        RecipeError: There is no such recipe; names the most similar one.
    """
    file = Path(path)
    if os.path.isfile(file):
        return file
    shipped = shipped_recipes()
    if file.name == str(path) and file.name in shipped:
        return shipped[file.name]
    if os.path.exists(file):
        kind = "a folder" if os.path.isdir(file) else "a pipe or a device"
        raise RecipeError(f"{path} is {kind}; a recipe is a YAML file")
    guess = did_you_mean(
        file.name.removesuffix(".yaml"), shipped, ", {}", otherwise=";", write=lambda near: f"the shipped recipe {near}"
    )
    raise RecipeError(
        f"there is no recipe {str(path)[:LONGEST_NAME]}{guess} `sparsetrain recipe list` shows what is shipped"
    )
