"""The sections of evaluation tasks: whatever their results declare, by no name of a task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from sparsetrain.evaluation.base import TaskResult
from sparsetrain.evaluation.curve_panels import draw_accuracy
from sparsetrain.evaluation.html.blocks import Section, Table, short_labels, significant
from sparsetrain.evaluation.html.svg import WIDTH, picture
from sparsetrain.evaluation.panels import few
from sparsetrain.evaluation.result import EvalResult, by_task, other_inputs

BROAD = 6.5
"""Inches above which a picture of one result has more than one map or axes, and keeps its width."""
MANY = 12
"""Rows above which a table is folded."""


def task_sections(results: Mapping[str, EvalResult], trained_length: int | None) -> list[Section]:
    """A section for each task that was measured.

    Args:
        results: by the label of the evaluation, or of the run.
        trained_length: tokens of a training row, where it is one.
    """
    sections = []
    for name, measured in by_task(results):
        kind = type(next(iter(measured.values())))
        section = Section(name)
        sections.append(section)
        with section.saying("The results cannot be shown"):
            report = kind.report(measured)
            section.heading = report.heading + kind.ending(name)
            section.about += filter(None, (report.about, other_inputs(measured)))
            section.tables.append(Table(report.title, report.rows))
            ending = f", {report.details_heading}" if report.details_heading else ""
            section.tables += [Table(f"{label}{ending}", rows, folded=True) for label, rows in report.details.items()]
            _draw(section, name, measured, trained_length)
    return sections


def difference_table(measured: Mapping[str, TaskResult]) -> Table:
    """Every number of a task in each run, with its difference to that of the first run."""
    first, *others = measured
    numbers = {label: result.metrics() for label, result in measured.items()}
    names = list(dict.fromkeys(name for found in numbers.values() for name in found))
    rows = [["", first, *(cell for label in others for cell in (label, "difference"))]]
    for name in names:
        values = [found.get(name) for found in numbers.values()]
        row = [name.strip("/_").replace("/", ", ") or "all"]
        for place, value in enumerate(values):
            row.append("-" if value is None else significant(value))
            if place:
                row.append("-" if value is None or values[0] is None else signed(value - values[0]))
        rows.append(row)
    return Table(f"Differences to {first}", rows, folded=len(rows) > MANY)


def signed(difference: float) -> str:
    """A difference with its sign."""
    return f"{'+' if difference > 0 else '-' if difference < 0 else ''}{significant(abs(difference))}"


def _draw(section: Section, name: str, measured: Mapping[str, TaskResult], trained_length: int | None) -> None:
    kind = type(next(iter(measured.values())))
    short = short_labels(list(measured))
    accuracy = {short[label]: found for label, result in measured.items() if (found := result.accuracy_by_length())}
    if any(len(found) > 1 for found in accuracy.values()):
        title = f"{section.heading}: found by length"
        shown = few(accuracy)
        section.draw(lambda: picture(lambda axes: draw_accuracy(axes, title, shown, trained_length), title))
    with section.saying("A picture cannot be drawn"):
        together = kind.drawing(name, {short[label]: result for label, result in measured.items()}, trained_length)
        if together is None:
            return
        for panel in together.panels or ([] if kind.wide else [together.draw]):
            section.draw(partial(picture, panel, f"{section.heading}: see the tables", titled=True))
        if not kind.wide or together.panels:
            return
        # Maps of several results side by side would be too small on a phone: each is a picture of its own.
        for label, result in few(measured).items():
            alone = kind.drawing(name, {short[label]: result}, trained_length)
            if alone is not None:
                width = alone.width if alone.width > BROAD else WIDTH
                title = f"{section.heading} of {label}: see the tables"
                section.draw(partial(picture, alone.draw, title, width=width, height=alone.height, whole=True))
