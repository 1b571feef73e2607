"""``sparsetrain compare-decode``: decode settings beside full attention, at equal bytes read."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsetrain.cli.arguments import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    Overrides,
    RecipeArgument,
    check_first,
    check_new,
    choose_device,
    choose_dtype,
)
from sparsetrain.counted import counted
from sparsetrain.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from rich.table import Table

    from sparsetrain.evaluation.base import Task
    from sparsetrain.evaluation.decode_comparison import DecodeRow
    from sparsetrain.inference.models import Source

BUDGETS = [0.0625, 0.125, 0.25, 0.5]


def compare_decode(
    model: ModelArgument,
    recipe: RecipeArgument,
    overrides: Overrides = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="The task of eval.tasks, where several have answers: recall, passkey or multi_turn, or its label.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the bytes that full attention reads; may be given again. By default 1/16, 1/8, 1/4 and 1/2.",
            show_default=False,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this setting: window, twilight, twilight-full, quest, double-sparsity, refreshkv, recycled, "
            "oracle-top-k or oracle-top-p; may be given again. By default all. With fields behind it, as in "
            "twilight,prune.p=0.7 or refreshkv,refresh.every=20, it is measured as it is and not at budgets.",
            metavar="NAME[,FIELD=VALUE]",
            show_default=False,
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model as a row, such as the same one trained with power or SparseK: it reads what its "
            "attention reads. May be given again.",
            metavar="RUN_OR_MODEL",
            show_default=False,
        ),
    ] = None,
    dense_layers: Annotated[
        list[int] | None,
        typer.Option(
            "--dense-layer",
            min=0,
            help="A layer that reads all keys, counted from 0; may be given again. By default none.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[int, typer.Option(min=0, help="Tokens before the first answer that are read one by one.")] = 32,
    extra: Annotated[int, typer.Option(min=0, help="Tokens that may follow an answer, where a document has one.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Documents at a time.")] = 32,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for decode.json, decode.csv and decode.md, written after each row, and decode.png.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Compare decode settings with full attention, a window and oracles, at equal bytes read.

    The model answers a task of the recipe's eval section (recall, passkey or multi_turn) under each setting: as
    published, and with as many keys as a budget of bytes allows. Prompts are read with full attention; the end of the
    question and the answer one by one. The oracles choose by the true softmax weights.

    \b
    Examples:
      sparsetrain compare-decode runs/evidence/needles-base recipes/evidence/needles-base.yaml --output needles
      sparsetrain compare-decode my-model my-recipe.yaml eval.tasks.recall.documents=50 --budget 0.1 --budget 0.2
      sparsetrain compare-decode my-model my-recipe.yaml --setting twilight --setting oracle-top-p --dense-layer 0
      sparsetrain compare-decode my-model my-recipe.yaml --setting twilight,prune.p=0.7 --beside my-power-run
    """
    from sparsetrain.recipe import load_recipe

    check_first(model, dtype, device)
    _check_overrides(overrides or [])
    budgets = budget or BUDGETS
    _check_budgets(budgets)
    if output is not None:
        check_new("output", output, "folder")
    loaded_recipe = load_recipe(recipe, overrides or [])

    from sparsetrain.cli.decode_rows import models_beside, read_setting
    from sparsetrain.evaluation.decode_settings import CONTEXT, WIDTH, chosen_settings, settings

    asked = [read_setting(each) for each in setting or []]
    tried = chosen_settings(asked, settings(CONTEXT, [], WIDTH))
    if budget and not any(each.fitted for each in tried):
        raise ModelError(
            f"--budget {budget[0]:g} has no effect: settings with fields are measured as they are; name one without"
        )
    kind, place = choose_dtype(dtype), choose_device(device)

    from rich.console import Console
    from rich.progress import Progress

    from sparsetrain.evaluation.decode_answers import Answerer, Question, longest
    from sparsetrain.evaluation.decode_comparison import compare
    from sparsetrain.evaluation.decode_table import blocks, draw, write
    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling.positions import position_limit
    from sparsetrain.tables import print_tables

    source = find_model(model)
    seed = loaded_recipe.recipe.train.seed
    sections = [each for each in loaded_recipe.recipe.eval.tasks if task in (None, each.label)]
    tasks = {each.label: each.build(source.tokenizer, seed) for each in sections}
    name, chosen = _choose(tasks, task, loaded_recipe.path)
    questions = [Question.of(row, question) for row in chosen.answered() or []]
    tokens, limit = longest(questions, extra), position_limit(source.outline)
    if limit is not None and tokens > limit:
        raise ModelError(
            f"the documents of {name} and --extra {extra} are {tokens} tokens, more than the {limit} positions of the "
            "model (max_position_embeddings); lower --extra, or give the task shorter lengths"
        )

    def load(found: Source) -> Answerer:
        loaded = found.load(kind).eval().to(place)
        return Answerer(loaded, found.tokenizer, questions, extra=extra, batch=batch)

    others = models_beside(beside or [], source, tokens, load)
    answerer = load(source)
    title = f"{model}, {name}: {counted(len(questions), 'document')} of up to {tokens} tokens"
    facts = {
        "title": title,
        "model": model,
        "recipe": str(loaded_recipe.path),
        "task": name,
        "question": question,
        "extra": extra,
        "device": place.type,
    }
    rows: list[DecodeRow] = []

    def keep(row: DecodeRow) -> None:
        """What was measured stays where the comparison is broken off."""
        rows.append(row)
        bar.update(running, description=f"documents, after {row.name}")
        if not console.is_terminal:
            console.print(f"{time.strftime('%H:%M:%S')} measured: {row.name}", markup=False, highlight=False)
        if output is not None:
            write(output, rows, facts)

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        running = bar.add_task("documents", total=None)
        compare(
            answerer,
            budgets=budgets,
            dense_layers=dense_layers or [],
            asked=asked,
            beside=others,
            on_batch=lambda documents: bar.advance(running, documents),
            on_row=keep,
        )
    for heading, cells in blocks(rows).items():
        print_tables(Console(), _table(heading, cells))
    if output is not None:
        draw(rows, title, output / "decode.png")
        print(f"{output}: decode.json, decode.csv, decode.md, decode.png", file=sys.stderr)


def _check_overrides(overrides: list[str]) -> None:
    for override in overrides:
        if not override.startswith(("eval.", "eval=", "train.seed=")):
            raise RecipeError(f"{override} has no effect here: only the eval section of the recipe is used")


def _check_budgets(budgets: list[float]) -> None:
    for share in budgets:
        if not 0 < share < 1:
            raise ModelError(
                f"--budget {share:g} is no share of the bytes of full attention; give one above 0 and below 1"
            )


def _choose(tasks: dict[str, Task], name: str | None, recipe: Any) -> tuple[str, Task]:
    """The one task with answers."""
    able = {label: each for label, each in tasks.items() if each.answered() is not None}
    if len(able) == 1:
        return next(iter(able.items()))
    if name is not None:
        raise RecipeError(
            f"--task {name}: {recipe} has no task of that name with answers (recall, passkey or multi_turn); leave "
            "--task out to take the one that has, or to be told their names"
        )
    if able:
        raise RecipeError(f"{recipe} has several tasks with answers; name one of {', '.join(able)} with --task")
    raise RecipeError(f"{recipe} has no task with answers; give eval.tasks one: recall, passkey or multi_turn")


def _table(title: str, cells: list[list[str]]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from sparsetrain.evaluation.decode_table import HEADINGS

    table = Table(box=SIMPLE, title=title, title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table
