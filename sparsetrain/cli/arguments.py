"""Arguments that several commands take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sparsetrain.recipe import LoadedRecipe

MOST_GPUS = 2**17
"""Maximum number of GPUs for a batch or a plan."""

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that override the recipe, such as train.lr=2e-5.", show_default=False
    ),
]


def print_notes(loaded: LoadedRecipe) -> None:
    """Print the notes of loading a recipe on standard error."""
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
