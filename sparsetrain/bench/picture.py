"""The picture of a benchmark: the columns that its rows name, against length, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.bench.table import Panel, Report
from sparsetrain.evaluation.panels import BLUE, FAINT, GREEN, INK, ORANGE, PAPER, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    "ours": (BLUE, "o"),
    "ours-triton": (BLUE, "s"),
    "sparsek": (BLUE, "s"),
    "twilight": (ORANGE, "o"),
    "twilight-quest": (PURPLE, "o"),
    "quest": (RED, "D"),
    "channels": (GREEN, "D"),
    "twilight-channels": (GREEN, "o"),
    "twilight-own": (BLUE, "^"),
    "refresh": (SKY, "o"),
    "flex": (ORANGE, "^"),
    "flex-tma": (ORANGE, "v"),
    "flex-flash": (RED, "v"),
    "fa4-blocks": (RED, "P"),
    "cudnn": (GREEN, "s"),
    "fa2": (SKY, "D"),
    "flash": (SKY, "D"),
    "fa4": (PURPLE, "P"),
    "efficient": (ORANGE, "^"),
    "math": (RED, "v"),
    "varlen": (PURPLE, "P"),
    "sdpa": (GREEN, "s"),
}


def draw(report: Report, out: Path) -> Path:
    """A PNG file. Implementations that read every key are dashed."""
    from matplotlib.figure import Figure

    panels = {name: shown.panel for name, shown in report.rows[0].columns().items() if shown.panel is not None}
    figure = Figure(figsize=(1 + 5 * len(panels), 5), layout="constrained")
    figure.suptitle(_title(report), fontsize=12, color=INK, wrap=True)
    every = figure.subplots(1, len(panels))
    for axes, (name, panel) in zip(every, panels.items(), strict=True):
        _draw_panel(axes, name, panel, report)
    if every[0].lines:
        every[0].legend(loc="best", edgecolor="none")
    figure.savefig(out, dpi=130, facecolor="white")
    return out


def _draw_panel(axes: Axes, column: str, panel: Panel, report: Report) -> None:
    axes.set(title=panel.title, ylabel=panel.unit, yscale="log" if panel.log else "linear")
    for name in dict.fromkeys(row.name for row in report.rows):
        _draw_line(axes, [row for row in report.rows if row.name == name], column)
    lengths = sorted({row.length for row in report.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    if panel.limit is not None and (value := report.facts.get(panel.limit[0])):
        axes.axhline(value, color=FAINT, linestyle=":")
        axes.annotate(panel.limit[1], (0, value), xycoords=axes.get_yaxis_transform(), color=FAINT)
    if not panel.log:
        axes.set_ylim(bottom=0)


def _draw_line(axes: Axes, rows: list[Any], column: str) -> None:
    """One implementation. What was not measured, or failed its check, is left out."""
    points = [(row.length, getattr(row, column)) for row in rows if row.check != "failed"]
    points = [(length, value) for length, value in points if value is not None]
    if points:
        color, marker = STYLES.get(rows[0].name, (INK, "x"))
        style = "-" if rows[0].sparse else "--"
        axes.plot(*zip(*points), color=color, marker=marker, linestyle=style, label=rows[0].title)


def _title(report: Report) -> str:
    facts, machine = report.options, report.machine
    where = machine.get("gpu") or f"CPU, {machine['cpu_threads']} threads"
    heads = f"{facts['heads']} heads on {facts['kv_heads']} KV heads of {facts['head_dim']}, {facts['dtype']}"
    return f"{facts['subject']}: {heads}; {where}"
