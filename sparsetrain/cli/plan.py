"""``sparsetrain plan``: estimate memory and time of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.arguments import MOST_GPUS, Overrides
from sparsetrain.cli.completion import complete_recipe


def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe file, or the name of a shipped recipe.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_GPUS, help="GPUs, one process each; one, or sequence.parallel of them.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="h100, h200, b200, a100, a100-40gb, l40s or 4090.")] = "h100",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of one GPU, such as 80GB; by default the device's.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The model's config.json, if its shape is not known here.", show_default=False),
    ] = None,
    liger: Annotated[bool, typer.Option(help="Assume that liger-kernel is installed (for train.liger: auto).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds as JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Tables in Markdown.")] = False,
    all_recipes: Annotated[
        bool, typer.Option("--all", help="Every shipped recipe on the GPUs its comment names (with --markdown).")
    ] = False,
) -> None:
    """Estimate the memory and time of a recipe before it runs, and suggest changes if it does not fit.

    Needs no GPU and no network, and torch only for a local model. Memory is counted by component and
    phase; time is for the recipe's attention and for dense attention in its place.

    \b
    Examples:
      sparsetrain plan qwen3-8b-power-128k --gpus 8
      sparsetrain plan my.yaml sequence.length=262144 --gpus 8 --device h200
      sparsetrain plan my.yaml --gpus 4 --memory 48GB --json
    """
    from sparsetrain.plan.command import run_plan

    run_plan(
        recipe,
        overrides or [],
        gpus=gpus,
        device=device,
        memory=memory,
        config=config,
        liger=liger,
        all_recipes=all_recipes,
        as_markdown=as_markdown,
        in_json=as_json,
    )
