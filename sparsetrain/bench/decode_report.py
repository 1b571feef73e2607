"""The results of ``sparsetrain bench decode`` as tables on the console, and as CSV, JSON and a picture in a folder."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsetrain.bench.decode_table import DecodeRow
from sparsetrain.bench.report import colored, empty_table, machine, number
from sparsetrain.evaluation.panels import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, RED, SKY
from sparsetrain.tables import print_tables

STYLES = {
    "ours": (BLUE, "o"),
    "sparsek": (BLUE, "s"),
    "flash": (SKY, "D"),
    "cudnn": (GREEN, "s"),
    "efficient": (ORANGE, "^"),
    "math": (RED, "v"),
    "varlen": (PURPLE, "P"),
    "sdpa": (GREEN, "s"),
}


@dataclass
class DecodeReport:
    """A benchmark with everything needed to repeat it."""

    command: str
    options: dict[str, object]
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    machine: dict[str, object] = field(default_factory=lambda: machine())
    copy_gbps: float | None = None
    """Bytes read and written by a copy within the memory, measured in the same run."""
    rows: list[DecodeRow] = field(default_factory=list)


def print_report(report: DecodeReport, console: Console | None = None) -> None:
    """Print a table for every length."""
    console = console or Console(highlight=False)
    for length in dict.fromkeys(row.length for row in report.rows):
        rows = [row for row in report.rows if row.length == length]
        print_tables(console, _length_table(rows))
        for row in rows:
            if text := "; ".join(filter(None, [row.note, row.reason])):
                console.print(f"  {row.name}: {text}", markup=False, soft_wrap=True)
    if report.copy_gbps:
        console.print(
            f"\nx floor: time over that of the method's bytes at the {report.copy_gbps:,.0f} GB/s of a copy, measured "
            "in this run.\nspeed-up: over the fastest that reads the whole cache. Times are of one layer's step.",
            soft_wrap=True,
        )


def write_report(report: DecodeReport, folder: Path) -> list[Path]:
    """Write ``decode.csv``, a line a row, and ``decode.json``, everything."""
    folder.mkdir(parents=True, exist_ok=True)
    table, record = folder / "decode.csv", folder / "decode.json"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [each.name for each in fields(DecodeRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in report.rows)
    content = asdict(report)
    for row in content["rows"]:
        # JSON has no NaN.
        row["error"] = "nan" if row["error"] != row["error"] else row["error"]
    record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [table, record]


def draw(report: DecodeReport, out: Path) -> Path:
    """Time of a step, and bytes read in it, against length, as a PNG file. Full-cache implementations are dashed."""
    from matplotlib.figure import Figure

    from sparsetrain.bench.picture import draw_line, finish

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(_title(report), fontsize=12, color=INK)
    time, rate = figure.subplots(1, 2)
    time.set(title="One decoding step of one layer", ylabel="ms", yscale="log")
    rate.set(title="Rate of the bytes that the method must read", ylabel="GB/s")
    for axes, column in ((time, "ms"), (rate, "gbps")):
        for name in dict.fromkeys(row.name for row in report.rows):
            draw_line(axes, [row for row in report.rows if row.name == name], column, STYLES)
        finish(axes, sorted({row.length for row in report.rows}))
    if report.copy_gbps:
        rate.axhline(report.copy_gbps, color=FAINT, linestyle=":")
        rate.annotate("copy", (0, report.copy_gbps), xycoords=rate.get_yaxis_transform(), color=FAINT)
    rate.set_ylim(bottom=0)
    if time.lines:
        time.legend(loc="best", edgecolor="none")
    figure.savefig(out, dpi=130, facecolor="white")
    return out


def _title(report: DecodeReport) -> str:
    facts, machine = report.options, report.machine
    where = machine.get("gpu") or f"CPU, {machine['cpu_threads']} threads"
    heads = f"{facts['heads']} heads on {facts['kv_heads']} KV heads of {facts['head_dim']}, {facts['dtype']}"
    power = f"PowerAttention, block {facts['block']}, window {facts['window']}"
    methods = f"{power}, and SparseK, topk and window {facts['topk']}"
    return f"Decoding with {methods}:\nbatch {facts['batch']}, {heads}; {where}"


def _length_table(rows: list[DecodeRow]) -> Table:
    rows = sorted(rows, key=lambda row: row.ms or float("inf"))
    columns = ["", "MB read", "ms", "GB/s", "floor ms", "x floor", "speed-up", "error", "check"]
    table = empty_table(f"{rows[0].length:,} tokens", columns, left=1)
    for row in rows:
        verdict = Text("see below", style="yellow") if row.reason else colored(row.check)
        table.add_row(
            Text(row.title, style="bold" if row.name == "ours" else ""),
            number(row.bytes_read / 1e6),
            number(row.ms),
            number(row.gbps),
            number(row.floor_ms),
            number(row.floor_ratio),
            number(row.speedup),
            "-" if row.error is None else f"{row.error:.1e}",
            verdict,
        )
    return table
