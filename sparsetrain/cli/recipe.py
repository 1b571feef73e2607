"""``sparsetrain recipe``: list, show, copy, validate, schema."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsetrain.cli.arguments import MOST_GPUS, Overrides, RecipeArgument, print_notes
from sparsetrain.errors import RecipeError, SparsetrainError

if TYPE_CHECKING:
    from sparsetrain.recipe import LoadedRecipe

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True, rich_markup_mode="rich")


@app.command(name="list")
def list_recipes() -> None:
    """List the recipes that come with sparsetrain.

    \b
    Start from one of them:
      sparsetrain recipe copy quickstart my.yaml
    """
    from sparsetrain.recipe.describe import summary
    from sparsetrain.recipe.shipped import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, file in shipped.items():
        print(f"{name:{width}}  {summary(file)}".rstrip())


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Put its description above every field.")] = False,
) -> None:
    """Print a recipe as a run would see it: bases merged, overrides applied, defaults filled in.

    \b
    Examples:
      sparsetrain recipe show quickstart
      sparsetrain recipe show quickstart train.lr=2e-5 --explain
    """
    from sparsetrain.recipe import dump_recipe, load_recipe
    from sparsetrain.recipe.describe import explained

    loaded = load_recipe(recipe, overrides or [])
    print_notes(loaded)
    print(explained(loaded.recipe) if explain else dump_recipe(loaded.recipe), end="")


@app.command()
def copy(
    recipe: RecipeArgument,
    target: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder to copy to; by default here.")
    ] = None,
) -> None:
    """Copy a shipped recipe, comments included, to start your own. Commands in them name the copy. Never overwrites.

    \b
    Examples:
      sparsetrain recipe copy quickstart
      sparsetrain recipe copy qwen3-8b-power-128k my.yaml
    """
    from sparsetrain.recipe.shipped import find_recipe, recipes_folder

    source = find_recipe(recipe)
    target = Path() if target is None else target
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RecipeError(f"{target} exists already; give another name: sparsetrain recipe copy {recipe} NAME.yaml")
    if not target.parent.is_dir():
        raise RecipeError(f"there is no folder {target.parent} to copy to")
    own = shlex.quote(str(target))
    try:
        if source.is_relative_to(recipes_folder()):
            target.write_text(_renamed(source.read_text(encoding="utf-8"), source.stem, own), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from error
    print(f"copied to {target}; see it with all that its base gives, and train it:")
    print(f"  sparsetrain recipe show {own}\n  sparsetrain run {own}")


def _renamed(text: str, name: str, own: str) -> str:
    """The recipe, with another name in the commands of its comments."""
    command = re.compile(rf"(?<=\s){re.escape(name)}(?=\s|$)")
    return "".join(
        command.sub(lambda _: own, line) if line.startswith("#   ") else line for line in text.splitlines(keepends=True)
    )


@app.command()
def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...", help="Recipes, and overrides for all of them.", show_default=False
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            "--ranks",
            min=1,
            max=MOST_GPUS,
            help="GPUs to resolve the batch for; one, or sequence.parallel of them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check recipes and the first row of their local data without loading a model, and print what follows from them.

    \b
    Examples:
      sparsetrain recipe validate my.yaml
      sparsetrain recipe validate recipes/*.yaml --gpus 8
      sparsetrain recipe validate my.yaml train.lr=2e-5
    """
    from sparsetrain.data.check import check_data
    from sparsetrain.recipe import load_recipe
    from sparsetrain.recipe.describe import attention_facts, batch_facts

    overrides = [argument for argument in arguments if "=" in argument and not os.path.isfile(argument)]
    names = [argument for argument in arguments if argument not in overrides]
    if not names:
        raise RecipeError("name at least one recipe to validate")
    failures = 0
    for name in names:
        try:
            loaded = load_recipe(name, overrides)
            gpus = ranks or loaded.recipe.sequence.parallel
            with loaded.naming_places():
                facts = f"{batch_facts(loaded.recipe, gpus)}; {attention_facts(loaded.recipe)}"
                _check_deepspeed(loaded, gpus)
                _check_model(loaded)
                data = check_data(loaded.recipe)
        except SparsetrainError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
        else:
            unchecked = f"; not checked: {', '.join(data.unchecked)}" if data.unchecked else ""
            print(f"{name}: valid: {facts}{unchecked}")
            print_notes(loaded)
            for line in data.shown:
                print(line)
            for remark in data.remarks:
                print(f"note: {remark}", file=sys.stderr)
    if failures:
        raise typer.Exit(RecipeError.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for completion in editors.

    \b
    Save it, and put this first line into a recipe (VS Code, Neovim and JetBrains read it):
      sparsetrain recipe schema > recipe.schema.json
      # yaml-language-server: $schema=recipe.schema.json
    """
    from sparsetrain.recipe.describe import json_schema

    print(json.dumps(json_schema(), indent=2))


def _check_deepspeed(loaded: LoadedRecipe, ranks: int) -> None:
    """Refuse a DeepSpeed JSON that contradicts the recipe, or that DeepSpeed refuses."""
    from sparsetrain.recipe.batch import plan_batch
    from sparsetrain.training.distributed.deepspeed_config import deepspeed_config

    config = deepspeed_config(loaded.recipe, plan_batch(loaded.recipe, ranks, rows_per_epoch=1))
    if loaded.recipe.deepspeed.config:
        from sparsetrain.training.distributed.engine import check_config

        check_config(config)


def _check_model(loaded: LoadedRecipe) -> None:
    """Refuse a model of the user's own that could not be built. That takes torch, so others are left to the run."""
    from sparsetrain.plan.public import check_public
    from sparsetrain.recipe.local_model import is_own

    check_public(loaded.recipe.model)
    if is_own(loaded.recipe):
        from sparsetrain.training.preflight import check_model

        check_model(loaded.recipe)
