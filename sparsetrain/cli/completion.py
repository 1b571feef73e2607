"""What a shell completes: recipes, run folders, and the keys of settings."""

from __future__ import annotations

from collections.abc import Iterator
from glob import escape, glob
from pathlib import Path
from typing import Any


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes, YAML files, and folders on the way to them."""
    from sparsetrain.recipe.shipped import shipped_recipes

    return [
        *(name for name in shipped_recipes() if name.startswith(incomplete)),
        *_files(incomplete, (".yaml", ".yml")),
    ]


def complete_run(incomplete: str) -> list[str]:
    """Folders: those of runs, where there are any."""
    folders = list(_files(incomplete, ()))
    return [each.rstrip("/") for each in folders if Path(each, "recipe.yaml").is_file()] or folders


def complete_setting(incomplete: str) -> list[str]:
    """Keys of a recipe: ``train.l`` becomes ``train.lr=``."""
    from sparsetrain.recipe.schema import Recipe

    if "=" in incomplete:
        return []
    *above, begun = incomplete.split(".")
    section: Any = Recipe
    for name in above:
        field = getattr(section, "model_fields", {}).get(name)
        section = None if field is None else _section(field.annotation)
    if section is None:
        return []
    prefix = "".join(f"{name}." for name in above)
    return [
        f"{prefix}{name}{'=' if _section(field.annotation) is None else '.'}"
        for name, field in section.model_fields.items()
        if name.startswith(begun)
    ]


def _section(annotation: Any) -> Any:
    """The section that a field holds; None for a value."""
    from typing import get_args

    from pydantic import BaseModel

    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _files(incomplete: str, endings: tuple[str, ...]) -> Iterator[str]:
    for found in sorted(glob(f"{escape(incomplete)}*")):
        if Path(found).is_dir():
            yield f"{found}/"
        elif found.endswith(endings or ("\0",)):
            yield found
