"""Compare evaluations: tables on the console, and ``evaluation.json`` and ``report.md`` in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain.durable import read_bytes, write_whole
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.base import Rows, TaskReport
from sparsetrain.evaluation.differences import differences
from sparsetrain.evaluation.panels import few
from sparsetrain.evaluation.result import EvalResult, by_task, other_inputs
from sparsetrain.tables import print_tables

RESULTS_FILE = "evaluation.json"
REPORT_FILE = "report.md"

RESULTS = TypeAdapter(dict[str, EvalResult])
"""The content of ``evaluation.json``: results by label."""


def print_results(results: Mapping[str, EvalResult], console: Console | None = None) -> None:
    """Print the tables of each task."""
    console = console or Console()
    for report, ending, others in _reports(results):
        print_tables(console, _table(report.title + ending, report.rows, report.shares))
        if others:
            console.print(Text(f"{others}\n"))
        if report.details:
            shown = few(report.details)
            print_tables(console, *(_table(label, rows, report.shares) for label, rows in shown.items()))


def print_differences(results: Mapping[str, EvalResult], console: Console) -> None:
    """Print the numbers of several results beside one another, with the differences to the first."""
    title = f"Beside one another (in brackets: the difference to {next(iter(results))})"
    print_tables(console, _table(title, differences(results), shares=False))


def write_report(
    results: Mapping[str, EvalResult],
    folder: Path,
    *,
    title: str,
    pictures: Sequence[Path] = (),
    history: Sequence[str] = (),
) -> Path:
    """Write ``evaluation.json`` (read back by :func:`read_results`) and ``report.md``; return the latter.

    Args:
        pictures: PNG files inside ``folder`` to show at the end.
        history: lines about what was changed when the run was resumed.

    Raises:
        OSError: one of them cannot be written, and is what it was.
    """
    dumped = RESULTS.dump_python(dict(results), mode="json")
    write_whole(folder / RESULTS_FILE, json.dumps(dumped, indent=1) + "\n")
    parts = [f"# {title}"]
    for shown, ending, others in _reports(results):
        parts += [f"## {shown.heading}{ending}", " ".join(filter(None, (shown.about, others))), _markdown(shown.rows)]
        for label, rows in shown.details.items():
            ending = f", {shown.details_heading}" if shown.details_heading else ""
            parts += [f"### {label}{ending}", _markdown(rows)]
    if history:
        parts += ["## Changed during the run", "\n".join(f"- {line}" for line in history)]
    parts += [f"![{picture.stem}]({picture.relative_to(folder).as_posix()})" for picture in pictures]
    report = folder / REPORT_FILE
    write_whole(report, "\n\n".join(parts) + "\n")
    return report


def read_results(folder: Path) -> dict[str, EvalResult]:
    """The results that :func:`write_report` wrote into a run folder; empty if there is no file.

    Raises:
        CheckpointError: the file holds something else.
    """
    file = folder / RESULTS_FILE
    try:
        return RESULTS.validate_json(read_bytes(file))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{file} does not hold the results of evaluations") from error


def _reports(results: Mapping[str, EvalResult]) -> Iterator[tuple[TaskReport, str, str]]:
    """The tables of each task, what tells its title from another one's, and which results do not compare."""
    for name, measured in by_task(results):
        result = type(next(iter(measured.values())))
        yield result.report(measured), result.ending(name), other_inputs(measured)


def _table(title: str, rows: Rows, shares: bool = False) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, min_width=len(title))
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(row[0], *(_colored(cell) if shares else cell for cell in row[1:]))
    return table


def _colored(cell: str) -> Text:
    """Colour percentages from red to green; leave other cells unchanged."""
    share = cell.removesuffix("%")
    if not share.isdecimal():
        return Text(cell)
    return Text(cell, style="green" if int(share) >= 90 else "red" if int(share) < 50 else "yellow")


def _markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])
