"""What lies in a folder that a run is to write to: a run must not begin over what somebody would miss."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import dump_recipe, load_recipe

MODEL_FILES = re.compile(r"config\.json|adapter_config\.json|.*\.(safetensors|bin|pt|pth|gguf)")
OF_A_RUN = ("final", "evaluation.json", "metrics.jsonl")
"""What a run leaves that took time to make, beside its checkpoints."""
WRITTEN = (
    *("recipe.yaml", "environment.json", "deepspeed.json", "history.json", "nonfinite.jsonl", "report.md"),
    *(f"{name}.png" for name in ("report", "loss", "attention", "passkey", "selection")),
)
"""What it would write over."""
UNFINISHED = re.compile(r".*\.(tmp|part|partial)")
"""Left behind by what was interrupted, and made anew."""


def of_a_run(folder: Path) -> list[str]:
    """What an earlier run left in a folder: checkpoints, results, models. Names below it."""
    checkpoints = (path for path in _entries(folder / "checkpoints") if re.fullmatch(r"step-\d+", path.name))
    found = [f"checkpoints/{path.name}" for path in checkpoints if _holds_anything(path)]
    found += [name for name in OF_A_RUN if _holds_anything(folder / name)]
    for path in _entries(folder):
        if MODEL_FILES.fullmatch(path.name) or (
            path.name not in OF_A_RUN
            and not UNFINISHED.fullmatch(path.name)
            and any(MODEL_FILES.fullmatch(below.name) for below in _entries(path))
        ):
            found.append(path.name)
    return found


def of_others(folder: Path) -> list[str]:
    """What a run would write over and no run that never began has left. Names below the folder."""
    found = [name for name in WRITTEN if _holds_anything(folder / name)]
    if _is_resolved(folder / "recipe.yaml"):
        found = [name for name in found if name not in ("recipe.yaml", "environment.json", "deepspeed.json")]
    return found


def enclosing_run(folder: Path) -> Path | None:
    """The part of another run's folder (its checkpoints, its model) that ``folder`` lies in."""
    place = folder.resolve()
    for above in place.parents:
        for part in (above / "checkpoints", above / "final"):
            if place.is_relative_to(part) and (above / "recipe.yaml").is_file():
                return part
    return None


def listed(names: list[str]) -> str:
    """A few names for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _holds_anything(path: Path) -> bool:
    try:
        return bool(_entries(path)) if path.is_dir() else os.stat(path).st_size > 0
    except OSError:
        return False


def _is_resolved(file: Path) -> bool:
    """Whether a recipe is one that a run wrote down; one written by hand differs at least in its comments."""
    try:
        return file.is_file() and dump_recipe(load_recipe(file).recipe) == file.read_text(encoding="utf-8")
    except (RecipeError, OSError, ValueError):
        return False
