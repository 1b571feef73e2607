"""The ``sparsetrain plan`` command: the plan of one recipe, or of all shipped ones as a page of the documentation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparsetrain.data.check import check_data
from sparsetrain.errors import RecipeError
from sparsetrain.plan.devices import find_device, parse_memory
from sparsetrain.plan.estimate import Plan, plan_recipe
from sparsetrain.plan.public import check_public
from sparsetrain.plan.report import as_json, markdown, print_plan
from sparsetrain.plan.shape import find_shape
from sparsetrain.recipe import load_recipe, shipped_recipes
from sparsetrain.recipe.local_model import is_own
from sparsetrain.recipe.schema import Recipe

COMMAND = "sparsetrain plan"

PAGE = """# Plans of the shipped recipes

What `sparsetrain plan` says of each recipe on the GPUs that its first comment names. Made by
`sparsetrain plan --all --markdown > docs/plans.md`. These are estimates, not measurements: how they are made, what the
rows and columns mean, and how far they are off where they were compared with a run, is told in
[recipes](recipes.md#what-a-recipe-needs).

Of every need 1 GiB is an allowance for CUDA, NCCL and cuBLAS. Rates were measured on one H200 and are scaled to other
cards by their data sheets. Rows count as full, of one document each, and `train.liger: auto` as not installed.
"""


def run_plan(
    name: str | None,
    overrides: Sequence[str],
    *,
    gpus: int | None,
    device: str,
    memory: str | None,
    config: Path | None,
    liger: bool,
    all_recipes: bool,
    as_markdown: bool,
    in_json: bool,
) -> None:
    """Print the plan of a recipe, or of all the shipped ones.

    Raises:
        SparsetrainError: an option, the recipe, the shape of its model or its data is not valid.
    """
    if all_recipes:
        if name is not None or in_json or not as_markdown:
            raise RecipeError("--all plans every shipped recipe as one page: sparsetrain plan --all --markdown")
        print(shipped_page(), end="")
        return
    if name is None:
        raise RecipeError("name a recipe to plan; `sparsetrain recipe list` shows what is shipped")
    if as_markdown and in_json:
        raise RecipeError("--markdown and --json are two forms of one answer; give one of them")
    loaded = load_recipe(name, overrides)
    with loaded.naming_places():
        check_public(loaded.recipe.model)
        if is_own(loaded.recipe):
            from sparsetrain.training.preflight import check_model  # imports torch, which other plans do without

            check_model(loaded.recipe)
        check_data(loaded.recipe)
    plan = make_plan(name, overrides, gpus=gpus, device=device, memory=memory, config=config, liger=liger)
    if in_json:
        print(json.dumps(as_json(plan), indent=2))
    elif as_markdown:
        print(markdown(plan, _written(name, overrides, plan.setting.ranks, device, memory, liger)), end="")
    else:
        print_plan(plan, Console(highlight=False))


def make_plan(
    name: str | Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    device: str = "h100",
    memory: str | None = None,
    config: Path | None = None,
    liger: bool = False,
) -> Plan:
    """The plan of a recipe given by name or file, on ``gpus`` GPUs, by default ``sequence.parallel``."""
    loaded = load_recipe(name, overrides)
    recipe = loaded.recipe

    def reload(more: list[str]) -> Recipe:
        return load_recipe(name, [*overrides, *more]).recipe

    with loaded.naming_places():
        return plan_recipe(
            recipe,
            find_shape(recipe.model, config),
            ranks=gpus or recipe.sequence.parallel,
            device=find_device(device),
            capacity=None if memory is None else parse_memory(memory),
            liger=liger,
            reload=reload,
        )


def shipped_page() -> str:
    """The plans of all shipped recipes, with the command in each recipe's first comment."""
    sections = [PAGE]
    for name, file in shipped_recipes().items():
        options = planned_options(file)
        plan = make_plan(name, gpus=int(options.get("gpus", "1")), device=options.get("device", "h100"))
        sections.append(markdown(plan, " ".join([COMMAND, name, *_flags(options)])))
    return "\n".join(sections)


def planned_options(file: Path) -> dict[str, str]:
    """The options of the ``sparsetrain plan`` line in a recipe's first comment; empty without such a line."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        if text.startswith(f"{COMMAND} {file.stem}"):
            words = shlex.split(text)[3:]
            return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    return {}


def _flags(options: dict[str, str]) -> list[str]:
    return [f"--{flag} {value}" for flag, value in options.items()]


def _written(name: str, overrides: Sequence[str], gpus: int, device: str, memory: str | None, liger: bool) -> str:
    words = [*COMMAND.split(), name, *overrides, "--gpus", str(gpus), "--device", device]
    words += ["--memory", memory] if memory else []
    return shlex.join(words + (["--liger"] if liger else []))
