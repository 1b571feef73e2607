"""``sparsetrain run``: train as a recipe says."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from sparsetrain.cli.arguments import Overrides, RecipeArgument, print_notes


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint of the run folder.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="Run folder; the same as the override output=FOLDER.", show_default=False)
    ] = None,
) -> None:
    """Train a recipe in this process.

    \b
    Examples:
      sparsetrain run quickstart
      sparsetrain run quickstart attention.method=sliding attention.block=32 --output runs/sliding
      sparsetrain run my.yaml train.lr=2e-5 eval.tasks.passkey.lengths=[4096,8192]
      sparsetrain run my.yaml --resume

    \b
    Several GPUs, one process each, through DeepSpeed's launcher:
      deepspeed launch/train.py my.yaml train.lr=2e-5

    A run stopped by SIGTERM or SIGUSR1 saves what it has and exits with 75: start it again with --resume.
    """
    from sparsetrain.training.supervision.signals import Outcome, Stopped, StopSignals

    outcome = Outcome.FINISHED
    with StopSignals() as signals:
        try:
            from sparsetrain.recipe import load_recipe

            loaded = load_recipe(recipe, overrides or [], output)
            from sparsetrain.training.output.folder_contents import output_folder, refuse_early

            refuse_early(output_folder(loaded.recipe), loaded.recipe, resume)
            if os.environ.get("RANK", "0") == "0":
                print_notes(loaded)
                # Importing torch and DeepSpeed and reading the model take a while, silently.
                print(f"{loaded.recipe.name}: loading the libraries, the model and the data", flush=True)
            from sparsetrain.training.run import run as train

            with loaded.naming_places():
                outcome = train(loaded.recipe, resume=resume, signals=signals)
        except Stopped as stopped:
            outcome = stopped.outcome
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)
