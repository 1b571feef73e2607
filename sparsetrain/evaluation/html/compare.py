"""``compare.html``: several runs in one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from sparsetrain.counted import counted
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.curve_panels import draw_curves, draw_layers
from sparsetrain.evaluation.html.blocks import Page, Section, Table, refuse_over, short_labels
from sparsetrain.evaluation.html.page import facts, plain, spread
from sparsetrain.evaluation.html.record import RunRecord, read_run
from sparsetrain.evaluation.html.svg import picture
from sparsetrain.evaluation.html.tasks import difference_table, task_sections
from sparsetrain.evaluation.panels import MAX_RESULTS
from sparsetrain.evaluation.result import EvalResult, by_task, other_inputs
from sparsetrain.recipe import Recipe
from sparsetrain.recipe.differences import differences

Runs = dict[str, RunRecord]
"""Runs by a name that only one of them has."""
MOST = 12
"""Runs in a page: more cannot be told apart."""


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of several runs; return its path.

    Raises:
        CheckpointError: a folder is not a run's, is given twice, or there are too few or too many.
        OSError: the file cannot be written.
    """
    if not 2 <= len(folders) <= MOST:
        raise CheckpointError(f"{counted(len(folders), 'run')} cannot be compared; give 2 to {MOST} run folders")
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise CheckpointError(f"{folders[index]} is given twice; give each run folder once")
    runs = _named([read_run(folder) for folder in folders])
    refuse_over(out)  # before anything is drawn
    return comparison(runs).write(out)


def comparison(runs: Runs) -> Page:
    """The page of several runs; differences are to the first."""
    recipes = {name: run.recipe for name, run in runs.items() if run.recipe is not None}
    changed = differences(list(recipes.values())) if len(recipes) > 1 else {}
    lengths = {recipe.sequence.length for recipe in recipes.values()}
    sections = [_numbers(runs), *_curves(runs)]
    sections += _tasks(runs, lengths.pop() if len(lengths) == 1 else None, changed.keys())
    sections += [*_densities(runs), _recipes(runs, recipes, changed)]
    notes = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
    title = f"{counted(len(runs), 'run')}: {', '.join(runs)}"
    return Page(title, f"Differences are to the first run, {next(iter(runs))}.", [], sections, notes)


def _named(records: Sequence[RunRecord]) -> Runs:
    """Runs by the name of their recipe; where several have the same, with the folder or path that tells them apart,
    and by that alone where all have it."""
    named: Runs = {}
    for record in records:
        same = [other for other in records if other.name == record.name]
        place = _place(record, same)
        name = record.name if len(same) == 1 else place if len(same) == len(records) else f"{record.name} ({place})"
        # A recipe may be called what another one with its folder is.
        named[name if name not in named else f"{record.name} ({record.folder.resolve()})"] = record
    return named


def _place(record: RunRecord, same: Sequence[RunRecord]) -> str:
    """The name of a run's folder, or else its path: the first that no other run has."""
    for place in (lambda run: run.folder.resolve().name, lambda run: str(run.folder)):
        if [place(other) for other in same].count(place(record)) == 1:
            return place(record)
    return str(record.folder.resolve())


def _numbers(runs: Runs) -> Section:
    """What each run is, and its loss and costs beside those of the first."""
    held = {name: {fact: (value, remark) for fact, value, remark in facts(run)} for name, run in runs.items()}
    rows = [["", *runs], ["Recipe", *(run.name for run in runs.values())]]
    for fact in KINDS:
        cells = []
        for found in held.values():
            value, remark = found.get(fact, ("-", ""))
            cells.append(f"{value} ({remark})" if remark else value)
        rows.append([fact, *cells])
    section = Section("The runs", tables=[Table("What was trained", rows)])
    first, *others = runs
    compared = [["", first, *(cell for name in others for cell in (name, "difference"))]]
    for label, unit, of_run in MEASURED:
        values = [of_run(run) for run in runs.values()]
        row = [label]
        for index, measured in enumerate(values):
            row.append("-" if measured is None else unit.format(measured))
            if index:
                row.append("-" if measured is None or not values[0] else f"{measured / values[0] - 1:+.1%}")
        if any(measured is not None for measured in values):
            compared.append(row)
    if len(compared) > 1:
        section.tables.append(Table(f"Loss and costs, and their difference to {first}", compared))
    return section


KINDS = ("Method", "Model", "Trained at", "Steps")
"""Facts of a run that have no difference."""
MEASURED: tuple[tuple[str, str, Callable[[RunRecord], float | None]], ...] = (
    ("last loss, nats per token", "{:.3f}", lambda run: run.metrics.last("loss")),
    ("tokens trained on", "{:,.0f}", lambda run: run.metrics.last("tokens")),
    ("throughput, tokens/s (median)", "{:,.0f}", lambda run: run.metrics.median("tokens_per_second")),
    ("peak memory, GB", "{:.3g}", lambda run: run.metrics.largest("peak_memory_gb")),
    ("cache, bytes a token", "{:,.0f}", lambda run: _cache_per_token(run)),
)
"""Label, format and value of the numbers of a run that have one."""


def _cache_per_token(run: RunRecord) -> float | None:
    return run.cache.own / run.cache.tokens if run.cache is not None else None


def _curves(runs: Runs) -> list[Section]:
    section = Section("Training")
    short = short_labels(list(runs))
    for name, title, unit in (
        ("loss", "Training loss", "loss (nats per token)"),
        ("tokens_per_second", "Throughput", "tokens per second"),
    ):
        curves = {short[label]: run.metrics.curves[name] for label, run in runs.items() if run.metrics.curves[name]}
        if curves:
            draw = partial(draw_curves, title=title, ylabel=unit, curves=curves)
            section.draw(partial(picture, draw, f"{title} of {counted(len(curves), 'run')} by step"))
    if not section.pictures:
        return []
    losses = {label: dict(run.metrics.curves["loss"]) for label, run in runs.items()}
    steps = sorted({step for found in losses.values() for step in found})
    rows = [["step", *runs]]
    for step, _ in spread([(step, 0.0) for step in steps]):
        rows.append([f"{step:,}", *(f"{found[step]:.4f}" if step in found else "-" for found in losses.values())])
    section.tables.append(Table("Loss by step", rows, folded=True))
    return [section]


def _tasks(runs: Runs, trained_length: int | None, changed: Iterable[str]) -> list[Section]:
    """The last evaluation of each run, by task."""
    last = {name: found for name, run in runs.items() if (found := run.last_result()) is not None}
    results: dict[str, EvalResult] = {name: result for name, (_, result) in last.items()}
    if not results:
        return []
    sections = task_sections(results, trained_length)
    for (task, measured), section in zip(by_task(results), sections, strict=True):
        if len(measured) > 1:
            with section.saying("Differences cannot be shown"):
                section.tables.insert(1, difference_table(measured))
        lacking = [name for name in runs if name not in measured]
        if lacking:
            section.about.append(f"Not measured in the last evaluation of {', '.join(lacking)}.")
        # A seed draws other prompts, and a model may have other tokens.
        causes = (f"eval.tasks.{task}.", *(("train.seed", "model.") if other_inputs(measured) else ()))
        if settings := [key for key in changed if key.startswith(causes)]:
            section.about.append(f"The runs measured different things: {', '.join(settings)} differ (see the recipes).")
    labels = "; ".join(f"{name}: {label}" for name, (label, _) in last.items())
    about = [f"The last evaluation of each run is compared. {labels}."]
    if len(results) > MAX_RESULTS:
        about.append("Pictures of tasks show the first two and the last two runs; tables show all.")
    return [Section("Evaluations", about), *sections]


def _densities(runs: Runs) -> list[Section]:
    short = short_labels(list(runs))
    found = {short[name]: run.layers for name, run in runs.items() if run.layers}
    if not found:
        return []
    section = Section("Attention")
    title = "Density: share of the causal pairs attended"
    section.draw(lambda: picture(lambda axes: draw_layers(axes, title, "share", found), title))
    return [section]


def _recipes(runs: Runs, recipes: Mapping[str, Recipe], changed: Mapping[str, list[object]]) -> Section:
    section = Section("Recipes")
    if len(recipes) < 2:
        section.about.append("Fewer than two recipes can be read, so there is nothing to compare.")
    elif not changed:
        section.about.append("The recipes have the same settings.")
    else:
        section.about.append(f"Name and output folder aside, they differ in {counted(len(changed), 'setting')}.")
        rows = [["setting", *recipes], *([key, *map(plain, values)] for key, values in changed.items())]
        section.tables.append(Table("Settings that differ", rows, words=True))
    return section
