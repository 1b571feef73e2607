"""Arguments that several commands take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sparsetrain.recipe import LoadedRecipe

MOST_GPUS = 2**17
"""GPUs that a batch or a plan is computed for."""

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings laid over the recipe, such as train.lr=2e-5.", show_default=False
    ),
]


def print_notes(loaded: LoadedRecipe) -> None:
    """Say on standard error what loading a recipe has decided."""
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
