"""``sparsetrain eval``: measure what a model can do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sparsetrain.cli.arguments import DeviceOption, DtypeOption, check_first, check_place, choose_device, choose_dtype
from sparsetrain.cli.completion import complete_run
from sparsetrain.cli.interrupt import INTERRUPTED, interruptible
from sparsetrain.errors import RecipeError

if TYPE_CHECKING:
    from sparsetrain.cli.eval_rows import Evaluation, Labelled
    from sparsetrain.evaluation.result import EvalResult
    from sparsetrain.recipe.rows import Row
    from sparsetrain.recipe.schema import EvalSection
    from sparsetrain.world import World

RANK_MINUTES = 10.0
"""Minutes in which all ranks must have started."""


class NamesTasks(TyperCommand):
    """A command whose help lists all tasks, including those of installed packages, without importing them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of the command, and the tasks."""
        from sparsetrain.evaluation.registry import INSTALLED, TASKS

        packages = {name: INSTALLED.package_of(name) for name in TASKS}
        names = [f"{name} ({package})" if package else name for name, package in packages.items()]
        self.epilog = f"Tasks of --tasks and eval.tasks: {', '.join(names)}"
        super().format_help(ctx, formatter)


def evaluate_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run, its final/, a folder of a model or of adapters, a Hub id, or sparsetrain:tiny.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="The recipe whose eval section says what is measured, by default that of the run; and overrides, such "
            "as eval.tasks.passkey.trials=20.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Measure these: names of the recipe's tasks, or kinds of tasks with their usual settings.",
            metavar="NAME,NAME",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Of every task that has lengths, in tokens; k is 1,024.", metavar="4k,8k,16k", show_default=False
        ),
    ] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="A row with this attention: trained (as the model records it, the default), dense, a method with its "
            "usual settings, its fields ('{method: power, block: 64}'), or a recipe that has them. May be given again.",
            metavar="trained|dense|METHOD",
            show_default=False,
        ),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(
            help="A row with this decode setting: none (all keys), recorded, what sparsetrain generate --decode takes, "
            "and fields behind it: twilight,prune.p=0.9 or select=quest,candidates=512. May be given again.",
            metavar="SETTING",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the rows to this JSON file, after each. Finished samples are kept beside it (FILE.samples).",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            help="Take finished samples of an earlier call with this --output, the default, or measure all again.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Measure what a model can do, and what its attention costs.

    A run is measured as its recipe says. Any other model needs a recipe, or --tasks. Every attention method and every
    decode setting is a row; the table has the difference to the first. With --output, the same command goes on where
    it was killed.

    \b
    Examples:
      sparsetrain eval runs/my
      sparsetrain eval runs/my --attention trained --attention dense
      sparsetrain eval Qwen/Qwen3-0.6B --tasks ruler,passkey --lengths 4k,8k
      sparsetrain eval my-model --tasks ruler --output ruler.json
      sparsetrain eval my-model my-recipe.yaml eval.tasks.ruler.samples=50
      sparsetrain eval my-model --tasks ruler --decode none --decode quest

    \b
    Several GPUs share the samples, with the same result:
      deepspeed launch/eval.py runs/my --tasks ruler --output ruler.json
      torchrun --nproc-per-node 8 launch/eval.py runs/my --output ruler.json

    Each decode setting is measured as it is. `sparsetrain compare-decode` instead gives all of them the same bytes to
    read, and measures what their attention loses.
    """
    from sparsetrain.cli.eval_tasks import choose_tasks, read_lengths
    from sparsetrain.cli.row_words import apart, read_attention, read_decoding
    from sparsetrain.recipe.rows import RECORDED, TRAINED, Row

    names = None if tasks is None else _names(tasks)
    asked = None if lengths is None else read_lengths(lengths)
    attentions = apart("--attention", [read_attention(each) for each in attention or [TRAINED]])
    decodings = apart("--decode", [read_decoding(each) for each in decode or [RECORDED]])
    _check_output(output, resume)
    check_first(model, dtype, device)

    @cache  # the model is only looked for where the settings need it
    def source() -> Any:
        from sparsetrain.inference.models import find_model

        return find_model(model)

    def positions() -> int | None:
        from sparsetrain.modeling.positions import position_limit

        return position_limit(source().outline)

    measured = choose_tasks(model, settings or [], names, asked, positions)
    asked_rows = [Row(each, decoding) for each in attentions for decoding in decodings]
    if attention is None and decode is None:
        asked_rows += _rows_of_recipe(measured.section)
    for task in measured.section.tasks:
        task.try_inputs(source().tokenizer)

    import transformers

    from sparsetrain.cli.eval_rows import Evaluation
    from sparsetrain.evaluation.runner import make_inputs
    from sparsetrain.sole_writer import sole_writer
    from sparsetrain.training.distributed.launcher import connect

    kind = choose_dtype(dtype)
    place = None if device is None else choose_device(device)
    # The bar of an evaluation is the only one.
    transformers.utils.logging.disable_progress_bar()
    inputs = make_inputs(measured.section, source().tokenizer, measured.seed)
    evaluation = Evaluation(source(), measured.section, measured.seed, inputs, kind, output, resume is False)
    rows = evaluation.labelled(asked_rows)
    world = connect(place, timeout=RANK_MINUTES)
    told = evaluation.told(rows, world, measured.recipe if names is None else None) if world.main else ""
    with sole_writer("--output", output if world.main else None):
        _measure(evaluation, rows, world, told)


def _measure(evaluation: Evaluation, rows: Sequence[Labelled], world: World, told: str) -> None:
    """Measure the rows and print what was measured, also where a row fails or the user stops.

    Args:
        told: what will be measured, on rank 0.
    """
    from rich.console import Console

    from sparsetrain.evaluation.report import print_differences, print_results

    if world.main:
        print(f"to measure: {told}", file=sys.stderr)
    results: dict[str, EvalResult] = {}
    try:
        with interruptible():
            evaluation.measure(rows, world, results)
    except KeyboardInterrupt:
        goes_on = (
            "nothing was kept without --output" if evaluation.output is None else "the same command goes on from here"
        )
        print(f"stopped: {goes_on}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        # What rows measured is told where a later one fails, or the disk is full, too.
        if world.main and results:
            print_results(results, Console())
            if len(results) > 1:
                print_differences(results, Console())


def _names(text: str) -> list[str]:
    names = [each.strip() for each in text.split(",") if each.strip()]
    if not names:
        raise RecipeError("--tasks is empty; give names such as perplexity,passkey")
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"--tasks has {name} {names.count(name)} times; each task is measured once")
    return names


def _rows_of_recipe(section: EvalSection) -> list[Row]:
    """The rows of a recipe, those of the model as it is first; a note names those that would measure the same again."""
    from sparsetrain.recipe.rows import TRAINED

    writes = any(task.writes for task in section.tasks)
    rows = []
    for asked in section.rows:
        row = asked.read()
        if row.decoding.recorded or writes:
            rows.append(row)
        else:
            names = ", ".join(section.by_name)
            print(f"note: the recipe's row {row.label} is left out: {names} write no texts", file=sys.stderr)
    return sorted(rows, key=lambda row: row.attention.label != TRAINED)


def _check_output(output: Path | None, resume: bool | None) -> None:
    if output is not None:
        check_place(output)
        if output.exists() and not _is_result(output):
            raise RecipeError(f"--output {output} exists already and is no result of eval; name another file")
    if output is None and resume is not None:
        flag = "--resume" if resume else "--fresh"
        raise RecipeError(f"{flag} has no effect without --output, beside which finished samples are kept; give it")


def _is_result(file: Path) -> bool:
    try:
        return file.is_file() and {"model", "rows"} <= json.loads(file.read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
