"""Evaluations compared: tables for the console, and ``evaluation.json`` and ``report.md`` for the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain.durable import read_bytes, write_whole
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.panels import few, with_passkey
from sparsetrain.evaluation.result import EvalResult, PasskeyResult
from sparsetrain.tables import print_tables

RESULTS_FILE = "evaluation.json"
REPORT_FILE = "report.md"

RESULTS = TypeAdapter(dict[str, EvalResult])
"""What ``evaluation.json`` holds: results by their labels."""

Rows = list[list[str]]
"""A table as text, its header first."""


def print_results(results: Mapping[str, EvalResult], console: Console | None = None) -> None:
    """Print perplexity by length, passkey accuracy by length, that by depth for a few results, and recall."""
    console = console or Console()
    if perplexity := perplexity_rows(results):
        print_tables(console, _table("Perplexity by context length", perplexity))
    measured = with_passkey(results)
    if measured:
        title = f"Passkeys found by prompt length (prompts at each length and depth: {_trials(measured)})"
        print_tables(console, _table(title, passkey_rows(measured), shares=True))
        maps = [_table(label, depth_rows(passkey), shares=True) for label, passkey in few(measured).items()]
        print_tables(console, *maps)
    if recall := recall_rows(results):
        print_tables(console, _table("Answers found in held-out documents", recall))


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
    if perplexity := perplexity_rows(results):
        tokens = max(result.perplexity_tokens for result in results.values())
        parts += [
            "## Perplexity by context length",
            f"Non-overlapping windows over the same {tokens:,} held-out tokens; the first of a window is not scored.",
            _markdown(perplexity),
        ]
    measured = with_passkey(results)
    if measured:
        parts += [
            "## Passkey retrieval",
            f"Keys found by prompt length in tokens. Prompts at each length and depth: {_trials(measured)}.",
            _markdown(passkey_rows(measured)),
        ]
    for label, passkey in measured.items():
        parts += [f"### {label}, by depth of the key", _markdown(depth_rows(passkey))]
    if recall := recall_rows(results):
        parts += ["## Recall", "Answers found in held-out documents of the synthetic task.", _markdown(recall)]
    if history:
        parts += ["## Changed on the way", "\n".join(f"- {line}" for line in history)]
    parts += [f"![{picture.stem}]({picture.relative_to(folder).as_posix()})" for picture in pictures]
    report = folder / REPORT_FILE
    write_whole(report, "\n\n".join(parts) + "\n")
    return report


def read_results(folder: Path) -> dict[str, EvalResult]:
    """The results that :func:`write_report` left in a run folder; none where it left nothing.

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


def perplexity_rows(results: Mapping[str, EvalResult]) -> Rows:
    """A row for each result and a column for each length; empty if none measured perplexity."""
    lengths = sorted({length for result in results.values() for length in result.perplexity})
    if not lengths:
        return []
    rows = [["", *(f"{length:,}" for length in lengths)]]
    for label, result in results.items():
        values = (result.perplexity.get(length) for length in lengths)
        rows.append([label, *("-" if value is None else _significant(value) for value in values)])
    return rows


def passkey_rows(measured: Mapping[str, PasskeyResult]) -> Rows:
    """A row for each result and a column for each length, in percent, then all lengths with their 95 % interval."""
    lengths = sorted({length for passkey in measured.values() for length in passkey.lengths})
    rows = [["", *(f"{length:,}" for length in lengths), "all", "95 % interval"]]
    for label, passkey in measured.items():
        shares = passkey.by_length()
        low, high = passkey.interval()
        cells = [f"{shares[length]:.0%}" if length in shares else "-" for length in lengths]
        rows.append([label, *cells, f"{passkey.mean():.0%}", f"{low:.0%} to {high:.0%}"])
    return rows


def recall_rows(results: Mapping[str, EvalResult]) -> Rows:
    """A row for each result that measured recall: answers found, their 95 % interval, the loss; empty if none did."""
    rows = [["", "found", "95 % interval", "answers", "loss"]]
    for label, result in results.items():
        if (recall := result.recall) is not None:
            low, high = recall.interval()
            cells = [
                f"{recall.accuracy():.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{recall.answers:,}",
                f"{recall.loss:.3f}",
            ]
            rows.append([label, *cells])
    return rows if len(rows) > 1 else []


def depth_rows(passkey: PasskeyResult) -> Rows:
    """A row for each depth and a column for each length, in percent."""
    rows = [["depth", *(f"{length:,}" for length in passkey.lengths)]]
    for depth, shares in zip(passkey.depths, zip(*passkey.accuracy(), strict=True), strict=True):
        rows.append([f"{depth:.0%}", *(f"{share:.0%}" for share in shares)])
    return rows


def _trials(measured: Mapping[str, PasskeyResult]) -> int:
    return next(iter(measured.values())).trials


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def _table(title: str, rows: Rows, shares: bool = False) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, min_width=len(title))
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(row[0], *(_colored(cell) if shares else cell for cell in row[1:]))
    return table


def _colored(cell: str) -> Text:
    """Shares from red to green; anything else as it is."""
    share = cell.removesuffix("%")
    if not share.isdecimal():
        return Text(cell)
    return Text(cell, style="green" if int(share) >= 90 else "red" if int(share) < 50 else "yellow")


def _markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])
