"""In which settings recipes differ, and which shipped recipe one is nearest to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.loading import load_recipe
from sparsetrain.recipe.schema import Recipe
from sparsetrain.recipe.shipped import shipped_recipes

OF_ITS_OWN = ("name", "output")
"""Settings that differ between any two runs."""
_OWN: Any = {"mode": "json", "exclude_defaults": True}


def settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its path: ``train.lr``, ``data.sources.0.path``, ``eval.tasks.passkey.lengths``.

    Lists of numbers or words are one setting.
    """
    tree = recipe.model_dump(mode="json", exclude=set(OF_ITS_OWN))
    tree["eval"]["tasks"] = dict(zip(recipe.eval.by_name, tree["eval"]["tasks"], strict=True))
    return dict(_leaves(tree, ()))


def differences(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """The settings in which recipes differ, with the value in each; None where one lacks it.

    A task or a source that one of them lacks is one setting, with what is not a default.
    """
    held, parts = [settings(recipe) for recipe in recipes], [_parts(recipe) for recipe in recipes]
    lacking = {name for each in parts for name in each if any(name not in other for other in parts)}
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for each in held for key in each):
        part = next((name for name in lacking if key.startswith(f"{name}.")), None)
        if part is None:
            found[key] = [each.get(key) for each in held]
        else:
            found[part] = [each.get(part) for each in parts]
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _parts(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The entries of lists of sections by path, each with what is not a default."""
    sources = {f"data.sources.{n}": source.model_dump(**_OWN) for n, source in enumerate(recipe.data.sources)}
    named = recipe.eval.by_name.items()
    tasks = {f"eval.tasks.{name}": {"task": task.task, **task.model_dump(**_OWN)} for name, task in named}
    return sources | tasks


def shipped_origin(recipe: Recipe) -> tuple[str, Recipe] | None:
    """The shipped recipe of the same name, or else the one that differs in the fewest settings."""
    shipped = shipped_recipes()
    names = [recipe.name] if recipe.name in shipped else list(shipped)
    best: tuple[int, str, Recipe] | None = None
    for name in names:
        found = _loaded(shipped[name])
        if found is None:
            continue
        count = len(differences([recipe, found]))
        if best is None or count < best[0]:
            best = count, name, found
    return None if best is None else (best[1], best[2])


@cache  # All shipped recipes are read for the page of a run that stems from none of them by name.
def _loaded(file: Path) -> Recipe | None:
    """A shipped recipe; None if it needs a variable of the environment that is not set."""
    try:
        return load_recipe(file).recipe
    except RecipeError:
        return None


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, (*path, str(name)))
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*path, str(index)))
    else:
        yield ".".join(path), tree
