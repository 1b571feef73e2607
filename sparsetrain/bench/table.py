"""Results of a benchmark: rows as tables on the console, and everything as CSV, JSON and a picture in a folder."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain.bench.check import Check
from sparsetrain.bench.contenders.base import Contender
from sparsetrain.tables import print_tables

PACKAGES = ("sparsetrain", "torch", "triton", "flash-attn-4")


@dataclass(frozen=True)
class Panel:
    """One diagram of the picture: a column of the rows against length."""

    title: str
    unit: str
    log: bool = False
    limit: tuple[str, str] | None = None
    """A fact of the report that no row can pass, and its name."""


def number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def formatted(text: str) -> Callable[[float | None], str]:
    """A form such as ``{:.1e}``, and a dash for what was not measured."""
    return lambda value: "-" if value is None else text.format(value)


@dataclass(frozen=True)
class Column:
    """The presentation of a row's field in a table."""

    head: str
    share: str = ""
    """A field that is shown after it in brackets, in percent."""
    optional: bool = False
    """Whether it is left out of tables in which no row has it."""
    form: Callable[[float | None], str] = number
    panel: Panel | None = None
    """Its diagram in the picture."""

    def cell(self, row: Row, name: str) -> str:
        """The field ``name`` of a row as text."""
        share = getattr(row, self.share) if self.share else None
        return self.form(getattr(row, name)) + ("" if share is None else f" ({share:.0%})")


def column(head: str, **more: Any) -> Any:
    """A field of a row that is a :class:`Column`, in the order of the fields. Not measured, it is None."""
    return field(default=None, metadata={"column": Column(head, **more)})


@dataclass(kw_only=True)
class Row:
    """One implementation at one length. What was not measured is None, and ``reason`` says why."""

    length: int
    name: str
    mhz: float | None = None
    """Clock of the SMs at the end of the timing."""
    watts: float | None = None
    """Power there, as NVML averages it over about a second."""
    note: str = ""
    reason: str = ""

    @classmethod
    def columns(cls) -> dict[str, Column]:
        """Its columns by the names of the fields."""
        return {each.name: each.metadata["column"] for each in fields(cls) if "column" in each.metadata}

    @property
    def order_ms(self) -> float | None:
        """The sort key of rows."""
        return None

    @property
    def summary(self) -> str:
        """The row in a few words, for the log."""
        return self.reason

    @property
    def remark(self) -> str:
        """The remark on the row below its table."""
        return "; ".join(filter(None, [self.note, self.reason]))

    def ends(self) -> tuple[dict[str, Text], dict[str, Text]]:
        """The left-aligned cells before and after the columns."""
        raise NotImplementedError

    @staticmethod
    def tables(report: Report) -> Iterable[tuple[str, Sequence[Row]]]:
        """Titles and rows of the tables."""
        for length in dict.fromkeys(row.length for row in report.rows):
            rows = [row for row in report.rows if row.length == length]
            yield f"{length:,} tokens", sorted(rows, key=lambda row: row.order_ms or float("inf"))

    @staticmethod
    def legend(report: Report) -> str:
        """The text below the tables."""
        return ""


@dataclass(kw_only=True)
class ComparedRow(Row):
    """A row of an implementation that is compared with a reference."""

    title: str
    sparse: bool
    check: str = ""
    """``passed``, ``failed``, ``unchecked`` where a comparison could not be made, or ``off``."""

    @classmethod
    def of(cls, contender: Contender, length: int, **more: Any) -> Self:
        """An empty row of a contender."""
        return cls(length=length, name=contender.name, title=contender.title, sparse=contender.sparse, **more)

    def ends(self) -> tuple[dict[str, Text], dict[str, Text]]:
        """The title, ours in bold, and the check."""
        title = Text(self.title, style="bold" if self.name == "ours" else "")
        return {"": title}, {"check": Text("see below", style="yellow") if self.reason else colored(self.check)}


@dataclass
class Report:
    """A benchmark with everything needed to repeat it."""

    name: str
    options: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    """Other results, such as the rate of a matrix product or of a copy in the same run."""
    command: str = field(default_factory=lambda: shlex.join(["sparsetrain", *sys.argv[1:]]))
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    machine: dict[str, object] = field(default_factory=lambda: machine())
    checks: list[Check] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)


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
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {**found, "versions": versions}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a table of the comparisons and those of the rows."""
    console = console or Console(highlight=False)
    if report.checks:
        print_tables(console, _checks_table(report.checks))
    kind = type(report.rows[0])
    for title, rows in kind.tables(report):
        print_tables(console, _rows_table(title, rows))
        for row in rows:
            if row.remark:
                console.print(f"  {row.name}: {row.remark}", markup=False, soft_wrap=True)
    if text := kind.legend(report):
        console.print(f"\n{text}", soft_wrap=True)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write ``NAME.csv``, a line a row, and ``NAME.json``, everything."""
    folder.mkdir(parents=True, exist_ok=True)
    table, record = folder / f"{report.name}.csv", folder / f"{report.name}.json"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [each.name for each in fields(report.rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in report.rows)
    content = asdict(report)
    for check, dumped in zip(report.checks, content["checks"], strict=True):
        dumped["passed"] = check.passed
    content = {**content.pop("facts"), **content}
    record.write_text(json.dumps(_without_nan(content), indent=1) + "\n", encoding="utf-8")
    return [table, record]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: one is written as text."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return "nan" if isinstance(value, float) and value != value else value


def _table(title: str, rows: Sequence[dict[str, str | Text]]) -> Table:
    """Rows of cells under their heads: text flush left, numbers flush right. The last column wraps."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, min_width=len(title))
    for index, (head, cell) in enumerate(rows[0].items(), 1):
        table.add_column(
            head.strip(), justify="left" if isinstance(cell, Text) else "right", no_wrap=index < len(rows[0])
        )
    for row in rows:
        table.add_row(*row.values())
    return table


def _rows_table(title: str, rows: Sequence[Row]) -> Table:
    cells: list[dict[str, str | Text]] = [dict(row.ends()[0]) for row in rows]
    for name, shown in rows[0].columns().items():
        texts = [shown.cell(row, name) for row in rows]
        if not shown.optional or set(texts) != {"-"}:
            for row, text in zip(cells, texts, strict=True):
                row[shown.head] = text
    return _table(title, [{**row, **each.ends()[1]} for row, each in zip(cells, rows, strict=True)])


def _checks_table(checks: list[Check]) -> Table:
    title = "Relative RMS errors in the worst 128 rows: output, gradients of query, key and value"
    names = ["out", "dq", "dk", "dv"]
    if any(len(check.errors) > len(names) for check in checks):
        title, names = f"{title}; in all rows, of the scores", [*names, "dscores"]
    rows: list[dict[str, str | Text]] = []
    for check in checks:
        errors = [f"{error:.1e}" for error in check.errors]
        errors += ["-"] * (len(names) - len(errors))
        verdict = colored("passed" if check.passed else "failed")
        rows.append(
            {
                "": Text(check.name),
                "tokens": f"{check.length:,}",
                "against": check.against,
                **dict(zip(names, errors, strict=True)),
                " ": Text(check.reason, style="yellow") if check.reason else verdict,
            }
        )
    return _table(title, rows)


def colored(verdict: str) -> Text:
    """Green where a check passed, red where it failed."""
    return Text(verdict, style={"passed": "green", "failed": "bold red"}.get(verdict, ""))
