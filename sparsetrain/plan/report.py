"""Print plans as tables on a terminal, Markdown for the documentation, or JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sparsetrain.counted import counted
from sparsetrain.plan.estimate import Plan
from sparsetrain.plan.memory import COMPONENTS
from sparsetrain.plan.speed import StepTime
from sparsetrain.recipe.batch import plan_batch
from sparsetrain.recipe.moments import evaluations_of
from sparsetrain.tables import print_tables, print_text

GIB = 2**30
ERROR = 0.15
"""Relative error of a plan's peak that is expected."""
SHORT = 0.05
"""Seconds of a pass below which the host, not the GPU, limits the speed."""


def headline(plan: Plan) -> str:
    """A summary in two sentences: the setting, and whether it fits."""
    setting = plan.setting
    name, gpus = setting.recipe.name, _gpus(plan)
    verdict = "fits" if plan.fits else "does not fit"
    free = abs(plan.capacity - plan.memory.needed) / GIB
    return (
        f"{name} on {gpus}: {setting.batch.describe()}. It {verdict}: {plan.memory.needed / GIB:.1f} GiB of "
        f"{plan.capacity / GIB:.1f} on each GPU, {free:.1f} {'to spare' if plan.fits else 'too many'}."
    )


def memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    """A table of components by phase in GiB, with totals. Components that are always zero are left out."""
    phases = plan.memory.phases
    rows = []
    for component in COMPONENTS:
        values = [phase.parts.get(component, 0.0) for phase in phases]
        if any(value >= 0.005 * GIB for value in values):
            rows.append((component, *(f"{value / GIB:.2f}" if value else "" for value in values)))
    peak = plan.memory.peak
    rows.append(("torch's peak", *(f"{phase.total / GIB:.2f}{' *' if phase is peak else ''}" for phase in phases)))
    return rows


def time_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Seconds of a step by what they go to, for the recipe's attention and for dense attention."""
    method = plan.setting.recipe.attention.method
    rows = [_time_row(method, plan.time)]
    if plan.setting.dense_layers < plan.setting.shape.layers:
        rows.append(_time_row("dense", plan.dense_time))
    return rows


TIME_COLUMNS = ("attention", "s/step", "tokens/s", "products", "attention", "elementwise", "waiting", "update")
"""The seconds of a step, tokens a second over all GPUs, and what the seconds go to."""


def _time_row(name: str, time: StepTime) -> tuple[str, ...]:
    parts = (time.matrices, time.attention, time.elementwise, time.communication, time.optimizer)
    return (name, _seconds(time.seconds), f"{time.tokens_per_second:,.0f}", *map(_seconds, parts))


def _seconds(value: float) -> str:
    # Below a millisecond the host decides, and longer numbers would not fit into 80 columns.
    return f"{value:.3g}" if value >= 0.001 or value == 0 else "<0.001"


def notes(plan: Plan) -> list[str]:
    """Notes specific to this plan."""
    setting = plan.setting
    lines = []
    if plan.fits and plan.memory.needed > (1 - ERROR) * plan.capacity:
        lines.append(f"The free memory is less than the expected error of a plan ({ERROR:.0%}): it may not fit.")
    if plan.memory.host:
        lines.append(
            f"{plan.memory.host / GIB:.1f} GiB of host memory for each rank, "
            f"{plan.memory.host * setting.ranks / GIB:.1f} for all {setting.ranks}."
        )
    if setting.dense_layers < setting.shape.layers:
        lines.append(
            f"{setting.dense_layers} of {setting.shape.layers} layers stay dense; a step is "
            f"{plan.dense_time.seconds / plan.time.seconds:.2f} times as fast as with dense attention in all of them."
        )
    for model in setting.second_models:
        beside = "is held whole on each GPU beside the model in evaluations"
        size = "its size is not known here and not counted" if model.size is None else f"{model.size / GIB:.1f} GiB"
        lines.append(f"{model.field}={model.name} {beside}: {size}. Null has the model itself choose.")
    if setting.attention.note is not None:
        lines.append(setting.attention.note)
    if plan.time.seconds / setting.batch.accumulation < SHORT:
        lines.append("Passes this short wait for the host, which is not counted: expect longer ones.")
    return lines


def general_notes(plan: Plan) -> list[str]:
    """Notes for every plan on this device."""
    setting = plan.setting
    scaled = "" if "H200" in setting.device.name else f" and are scaled to the {setting.device.name} by its data sheet"
    lines = [
        "The memory includes 1 GiB for CUDA, NCCL and cuBLAS, which torch's peak does not count.",
        f"Rates were measured on one H200{scaled}. Rows count as full, with one document each.",
    ]
    steps = None if setting.recipe.train.epochs is not None else plan_batch(setting.recipe, setting.ranks).steps
    if steps is not None:
        whole = _duration(steps * plan.time.seconds)
        lines.append(f"The run takes {counted(steps, 'step')}: {whole}, without loading and checkpoints.")
    if evaluations := evaluations_of(setting.recipe, steps, at_start=setting.recipe.eval.measures_at_start):
        tasks = ", ".join(setting.recipe.eval.by_name)
        lines.append(f"Evaluations are not in these times: {evaluations}; each of {tasks}.")
    if setting.recipe.train.liger == "auto":
        taken = "installed" if setting.liger else "not installed; --liger plans with liger-kernel"
        lines.append(f"train.liger: auto is taken as {taken}.")
    return lines


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def print_plan(plan: Plan, console: Console) -> None:
    """A plan on the terminal."""
    print_text(console, headline(plan))
    table = Table(title="GiB on each GPU, by phase; * the peak", box=None, title_justify="left")
    for column in ("", *(phase.name for phase in plan.memory.phases)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in memory_rows(plan):
        table.add_row(*row, style="bold" if row[0] == "torch's peak" else None)
    print_tables(console, table)
    table = Table(title="Time of a step in seconds", box=None, title_justify="left", pad_edge=False)
    for index, column in enumerate(TIME_COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in time_rows(plan):
        table.add_row(*row)
    print_tables(console, table)
    for line in [*notes(plan), *general_notes(plan)]:
        print_text(console, f"- {line}", indent=2)
    for line in advice(plan):
        if plan.suggestion and line.split() == list(plan.suggestion.combination):
            console.print(line, soft_wrap=True)  # to be copied
        else:
            print_text(console, line, indent=4)


def advice(plan: Plan) -> list[str]:
    """Suggested changes if it does not fit."""
    suggestion = plan.suggestion
    if suggestion is None:
        return []
    lines = ["To make it fit, from the least to the most expensive change, each in addition to those before it:"]
    for change in suggestion.changes:
        lines.append(f"  {' '.join(change.overrides):<44} saves {change.saves / GIB:7.1f} GiB; costs: {change.costs}")
    if suggestion.combination:
        lines.append(f"These are enough, at {suggestion.needed / GIB:.1f} GiB, and all are needed. Append:")
        lines.append(f"  {' '.join(suggestion.combination)}")
    else:
        lines.append(f"All of them together still need {suggestion.needed / GIB:.1f} GiB: use more or larger GPUs.")
    return lines


def markdown(plan: Plan, command: str) -> str:
    """A plan as a section of the documentation, with the command that makes it."""
    phases = [phase.name for phase in plan.memory.phases]
    lines = [f"## {plan.setting.recipe.name}", "", f"`{command}`", "", headline(plan), ""]
    lines += _markdown_table(("GiB", *phases), memory_rows(plan))
    lines += ["", *_markdown_table(TIME_COLUMNS, time_rows(plan)), ""]
    lines += [f"- {line}" for line in notes(plan)]
    text = advice(plan)
    if text:
        lines += ["", "```text", *text, "```"]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    aligned = ["---"] + ["---:"] * (len(columns) - 1)
    return [f"| {' | '.join(row)} |" for row in (columns, tuple(aligned), *rows)]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan, in bytes and seconds."""
    setting, suggestion = plan.setting, plan.suggestion
    parameters = setting.parameters
    return {
        "recipe": setting.recipe.name,
        "gpus": setting.ranks,
        "device": setting.device.name,
        "capacity_bytes": plan.capacity,
        "needed_bytes": plan.memory.needed,
        "fits": plan.fits,
        "host_bytes_per_rank": plan.memory.host,
        "parameters": parameters.total,
        "trained_parameters": parameters.trained,
        "liger": setting.liger,
        "phases": {phase.name: {**phase.parts, "total": phase.total} for phase in plan.memory.phases},
        "peak_phase": plan.memory.peak.name,
        "not_timed": list(setting.recipe.eval.by_name),
        "tokens_per_step": plan.time.tokens,
        "step": _time_json(plan.time),
        "dense_step": _time_json(plan.dense_time),
        "changes": [
            {"overrides": list(change.overrides), "saves_bytes": change.saves, "costs": change.costs}
            for change in (suggestion.changes if suggestion else ())
        ],
        "combination": list(suggestion.combination) if suggestion else [],
    }


def _time_json(time: StepTime) -> dict[str, float]:
    return {
        "seconds": time.seconds,
        "tokens_per_second": time.tokens_per_second,
        "matrices": time.matrices,
        "attention": time.attention,
        "elementwise": time.elementwise,
        "communication": time.communication,
        "optimizer": time.optimizer,
    }


def _gpus(plan: Plan) -> str:
    ranks, name = plan.setting.ranks, plan.setting.device.name
    return f"one {name}" if ranks == 1 else f"{ranks} x {name}"
