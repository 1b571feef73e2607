"""The chat template that a recipe names: one that ships with this package, or a file."""

from __future__ import annotations

import os
from pathlib import Path

from sparsetrain.errors import RecipeError
from sparsetrain.nearest import did_you_mean
from sparsetrain.textfile import read_text

FOLDER = Path(__file__).parents[1] / "assets" / "chat_templates"
"""The shipped templates. Each marks what the assistant says with ``{% generation %}``."""


def shipped_templates() -> list[str]:
    """The names of the shipped templates."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def chat_template_text(name: str) -> str:
    """The text of a template.

    Args:
        name: ``model.chat_template``: the name of a shipped template, or the path of a file.

    Raises:
        RecipeError: There is neither such a name nor such a file, or the file cannot be read or is empty.
    """
    shipped = shipped_templates()
    file = FOLDER / f"{name}.jinja" if name in shipped else Path(os.path.expanduser(name))
    if not os.path.isfile(file):
        hint = did_you_mean(name, shipped, " ({})")
        raise RecipeError(
            f"model.chat_template={name!r} is neither a file nor a template that ships with sparsetrain{hint}; those "
            f"are {', '.join(shipped)}"
        )
    text = read_text(file, f"model.chat_template={name!r}", RecipeError)
    if not text.strip():
        raise RecipeError(f"model.chat_template={name!r} is an empty file")
    return text
