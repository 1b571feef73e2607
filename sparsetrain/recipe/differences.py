"""In which settings recipes differ, and which shipped recipe one is nearest to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.loading import load_recipe
from sparsetrain.recipe.schema import Recipe
from sparsetrain.recipe.shipped import shipped_recipes

OF_ITS_OWN = ("name", "output")
"""Settings that differ between any two runs."""


def settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its path: ``train.lr``, ``data.sources.0.path``, ``eval.tasks.passkey.lengths``.

    Lists of numbers or words are one setting.
    """
    tree = recipe.model_dump(mode="json", exclude=set(OF_ITS_OWN))
    tree["eval"]["tasks"] = dict(zip(recipe.eval.by_name, tree["eval"]["tasks"], strict=True))
    return dict(_leaves(tree, ()))


def differences(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """The settings in which recipes differ, with the value in each; None where one lacks it."""
    held = [settings(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for each in held for key in each)
    found = {key: [each.get(key) for each in held] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def shipped_origin(recipe: Recipe) -> tuple[str, Recipe] | None:
    """The shipped recipe of the same name, or else the one that differs in the fewest settings."""
    shipped = shipped_recipes()
    names = [recipe.name] if recipe.name in shipped else list(shipped)
    best: tuple[int, str, Recipe] | None = None
    for name in names:
        try:
            found = load_recipe(shipped[name]).recipe
        except RecipeError:  # it needs a variable of the environment
            continue
        count = len(differences([recipe, found]))
        if best is None or count < best[0]:
            best = count, name, found
    return None if best is None else (best[1], best[2])


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, (*path, str(name)))
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*path, str(index)))
    else:
        yield ".".join(path), tree
