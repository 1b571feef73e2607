"""Results as tables on the console, and as CSV, JSON and a picture in a folder."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain.bench.attention_opponents import Opponent, P
from sparsetrain.bench.check import Check
from sparsetrain.bench.problem import BACKWARD_WORK
from sparsetrain.tables import print_tables

PACKAGES = ("sparsetrain", "torch", "triton", "flash-attn-4")


@dataclass
class Row:
    """One implementation at one length. What was not measured is None, and ``reason`` says why."""

    length: int
    name: str
    title: str
    sparse: bool
    documents: int
    forward_flops: float
    """On the pairs of tokens that this implementation has to compute."""
    forward_ms: float | None = None
    both_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    forward_share: float | None = None
    """Of the measured matrix product's rate."""
    backward_share: float | None = None
    extra_mib: float | None = None
    """Peak memory of forward and backward beyond inputs, output and gradients."""
    mask_ms: float | None = None
    mask_mib: float | None = None
    """Peak memory of building the mask."""
    selection_ms: float | None = None
    """Of ``both_ms``, the selection of keys and its gradient, timed apart."""
    selection_share: float | None = None
    """Of ``both_ms``."""
    attention_tflops: float | None = None
    """Forward and backward without the selection."""
    forward_ratio: float | None = None
    """This time over ours: above 1, ours is faster."""
    both_ratio: float | None = None
    rank: int | None = None
    """By forward and backward together, at this length; only of rows whose checks have not failed."""
    check: str = ""
    note: str = ""
    reason: str = ""

    @classmethod
    def of(cls, opponent: Opponent[P], problem: P, reason: str = "") -> Row:
        """An empty row."""
        documents = len(problem.documents or (problem.length,))
        flops = problem.flops(opponent.sparse)
        return cls(problem.length, opponent.name, opponent.title, opponent.sparse, documents, flops, reason=reason)

    def complete(self, ceiling_tflops: float | None) -> None:
        """Work out what follows from the times."""
        if self.forward_ms is None:
            return
        self.forward_tflops = self.forward_flops / self.forward_ms / 1e9
        # A machine that does something else meanwhile can make the difference of two medians negative.
        if self.both_ms is not None and self.both_ms > self.forward_ms:
            self.backward_ms = self.both_ms - self.forward_ms
            self.backward_tflops = BACKWARD_WORK * self.forward_flops / self.backward_ms / 1e9
        if self.both_ms is not None and self.selection_ms is not None:
            self.selection_share = self.selection_ms / self.both_ms
            if self.both_ms > self.selection_ms:
                work = (1 + BACKWARD_WORK) * self.forward_flops
                self.attention_tflops = work / (self.both_ms - self.selection_ms) / 1e9
        if ceiling_tflops:
            self.forward_share = self.forward_tflops / ceiling_tflops
            self.backward_share = None if self.backward_tflops is None else self.backward_tflops / ceiling_tflops

    @property
    def summary(self) -> str:
        """The row in a few words, for the log."""
        if self.forward_ms is None or self.both_ms is None:
            return self.reason
        return f"forward {self.forward_ms:.4g} ms, forward + backward {self.both_ms:.4g} ms"


def rank(rows: Iterable[Row]) -> None:
    """Rank the rows of one length and set their times in proportion to ours. A failed check takes a row out of both."""
    sound = [(row, row.forward_ms, row.both_ms) for row in rows if row.forward_ms and row.both_ms]
    sound = sorted((each for each in sound if each[0].check != "failed"), key=lambda each: each[2])
    ours = next((each for each in sound if each[0].name == "ours"), None)
    for place, (row, forward_ms, both_ms) in enumerate(sound, start=1):
        row.rank = place
        if ours is not None:
            row.forward_ratio, row.both_ratio = forward_ms / ours[1], both_ms / ours[2]


@dataclass
class Report:
    """A benchmark with everything needed to repeat it."""

    name: str
    command: str
    options: dict[str, object]
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    machine: dict[str, object] = field(default_factory=lambda: machine())
    ceiling_tflops: float | None = None
    """What a bare matrix product of the same dtype reached in the same run."""
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def machine() -> dict[str, object]:
    """The hardware and the versions that decide the results."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    found: dict[str, object] = {"cpu_cores": os.cpu_count(), "cpu_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {**found, "versions": versions}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a table of the comparisons and one for every length."""
    console = console or Console(highlight=False)
    if report.checks:
        print_tables(console, _checks_table(report.checks))
    for length in dict.fromkeys(row.length for row in report.rows):
        rows = [row for row in report.rows if row.length == length]
        print_tables(console, _length_table(rows))
        for row in rows:
            if text := "; ".join(filter(None, [row.note, row.reason])):
                console.print(f"  {row.name}: {text}", markup=False, soft_wrap=True)
    if report.ceiling_tflops:
        console.print(
            f"\n(%): of the {report.ceiling_tflops:.3g} TFLOP/s of a bare matrix product, measured in this run. "
            "TFLOP/s count visible pairs; backward 2.5 times forward.\n"
            "x: time over ours. Memory beyond inputs, output and gradients; of a mask, at the peak of building it.",
            soft_wrap=True,
        )
    if any(row.selection_ms is not None for row in report.rows):
        console.print(
            "select: the selection, forward and backward, timed apart (%: of both passes). TFLOP/s rest: both passes "
            "without it.",
            soft_wrap=True,
        )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write ``NAME.csv``, a line a row, and ``NAME.json``, everything."""
    folder.mkdir(parents=True, exist_ok=True)
    table, record = folder / f"{report.name}.csv", folder / f"{report.name}.json"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [each.name for each in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in report.rows)
    record.write_text(json.dumps(_as_json(report), indent=1) + "\n", encoding="utf-8")
    return [table, record]


def _as_json(report: Report) -> dict[str, Any]:
    """The report, with the verdict of every check. JSON has no NaN: one is written as text."""
    record = asdict(report)
    for check, dumped in zip(report.checks, record["checks"], strict=True):
        dumped["passed"] = check.passed
        dumped["errors"] = [error if error == error else "nan" for error in check.errors]
    return record


def _length_table(rows: list[Row]) -> Table:
    documents = f", {rows[0].documents} documents" if rows[0].documents > 1 else ""
    rows = sorted(rows, key=lambda row: row.both_ms or float("inf"))
    columns = {
        "fwd ms": [number(row.forward_ms) for row in rows],
        "fwd+bwd ms": [number(row.both_ms) for row in rows],
        "bwd ms": [number(row.backward_ms) for row in rows],
        "TFLOP/s fwd": [_rate(row.forward_tflops, row.forward_share) for row in rows],
        "TFLOP/s bwd": [_rate(row.backward_tflops, row.backward_share) for row in rows],
        "select ms": [_rate(row.selection_ms, row.selection_share) for row in rows],
        "TFLOP/s rest": [number(row.attention_tflops) for row in rows],
        "memory MiB": [number(row.extra_mib) for row in rows],
        "mask ms": [number(row.mask_ms) for row in rows],
        "mask MiB": [number(row.mask_mib) for row in rows],
        "x fwd": [number(row.forward_ratio) for row in rows],
        "x fwd+bwd": [number(row.both_ratio) for row in rows],
    }
    measured = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    table = empty_table(f"{rows[0].length:,} tokens{documents}", ["", "", *measured, "check"], left=2)
    for row, *cells in zip(rows, *measured.values(), strict=True):
        place = "" if row.rank is None else str(row.rank)
        title = Text(row.title, style="bold" if row.name == "ours" else "")
        verdict = Text("see below", style="yellow") if row.reason else colored(row.check)
        table.add_row(place, title, *cells, verdict)
    return table


def _checks_table(checks: list[Check]) -> Table:
    title = "Relative RMS errors in the worst 128 rows: output, gradients of query, key and value"
    names = ["out", "dq", "dk", "dv"]
    if any(len(check.errors) > len(names) for check in checks):
        title, names = f"{title}; in all rows, of the scores", [*names, "dscores"]
    table = empty_table(title, ["", "tokens", "against", *names, ""], left=1)
    for check in checks:
        errors = [f"{error:.1e}" for error in check.errors]
        errors += ["-"] * (len(names) - len(errors))
        verdict = (
            Text(check.reason, style="yellow") if check.reason else colored("passed" if check.passed else "failed")
        )
        table.add_row(check.name, f"{check.length:,}", check.against, *errors, verdict)
    return table


def empty_table(title: str, columns: list[str], left: int) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, min_width=len(title))
    for index, name in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(name, justify="left" if index < left or last else "right", no_wrap=not last)
    return table


def colored(verdict: str) -> Text:
    return Text(verdict, style={"passed": "green", "failed": "bold red"}.get(verdict, ""))


def _rate(value: float | None, share: float | None) -> str:
    return number(value) + ("" if share is None else f" ({share:.0%})")


def number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
