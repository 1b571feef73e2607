"""``sparsetrain doctor``: check this machine, or its fitness for a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsetrain.cli.arguments import MOST_GPUS, Overrides
from sparsetrain.cli.completion import complete_recipe
from sparsetrain.errors import RecipeError


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="Also check this machine for the needs of a recipe.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_GPUS,
            help="GPUs of the recipe's run, one process each; one, or sequence.parallel of them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check this machine: versions, stale locks, GPU and kernels, ports, disk, W&B login.

    Exits with code 2 if anything would stop a run.

    \b
    Examples:
      sparsetrain doctor
      sparsetrain doctor qwen3-8b-power-128k --gpus 8
    """
    from sparsetrain.doctor import diagnose
    from sparsetrain.recipe import load_recipe

    if recipe is None:
        if gpus is not None:
            raise RecipeError("--gpus is of a run: name its recipe too")
        raise typer.Exit(diagnose())
    loaded = load_recipe(recipe, overrides or [])
    raise typer.Exit(diagnose(loaded.recipe, loaded.naming_places, gpus))
