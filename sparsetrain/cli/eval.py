"""``sparsetrain eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sparsetrain.cli.arguments import Overrides, RecipeArgument, choose_device
from sparsetrain.errors import ModelError, RecipeError


class NamesTasks(TyperCommand):
    """A command whose help lists all tasks, including those of installed packages, without importing them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of the command, and the tasks."""
        from sparsetrain.evaluation.registry import INSTALLED, TASKS

        packages = {name: INSTALLED.package_of(name) for name in TASKS}
        names = [f"{name} ({package})" if package else name for name, package in packages.items()]
        self.epilog = f"Tasks of eval.tasks: {', '.join(names)}"
        super().format_help(ctx, formatter)


def evaluate_folder(
    folder: Annotated[Path, typer.Argument(help="A trained model: the final/ of a run folder.", show_default=False)],
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result to this JSON file.", show_default=False)
    ] = None,
) -> None:
    """Evaluate a trained folder with the eval section of a recipe.

    The folder determines the attention method; the recipe determines the evaluation tasks.

    \b
    Examples:
      sparsetrain eval runs/quickstart/final quickstart
      sparsetrain eval runs/quickstart/final quickstart eval.tasks.passkey.lengths=[4096] --output result.json
    """
    from sparsetrain.recipe import load_recipe

    for override in overrides or []:
        if not override.startswith(("eval.", "eval=", "train.seed=")):
            raise RecipeError(f"{override} has no effect here: only the eval section of the recipe is used")
    loaded = load_recipe(recipe, overrides or [])
    section = loaded.recipe.eval
    if section.empty:
        raise RecipeError(f"{loaded.path} has nothing to measure: give eval.tasks")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(
            f"{folder} holds no model (no config.json or adapter_config.json); give the final/ folder of a run"
        )
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise RecipeError(f"--output {output}: there is no such folder to write to; name a file in one that exists")
    from rich.console import Console
    from rich.progress import Progress

    from sparsetrain.evaluation.report import print_results
    from sparsetrain.evaluation.runner import evaluate
    from sparsetrain.modeling import check_learned_positions, load
    from sparsetrain.modeling.tokenizers import load_tokenizer
    from sparsetrain.world import World

    device = choose_device(None)
    model: Any = load(folder)
    for each in section.tasks:
        check_learned_positions(model, {each.path(name): lengths for name, lengths in each.lengths_by_field().items()})
    model.to(device)
    tokenizer = load_tokenizer(folder, "FOLDER (its tokenizer)")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        result = evaluate(
            model,
            tokenizer,
            section,
            World(0, 1, device),
            seed=loaded.recipe.train.seed,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_results({str(folder): result})
    if output is not None:
        output.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
