"""The picture of a benchmark: time and rate against length, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsetrain.bench.report import Report, Row
from sparsetrain.evaluation.panels import BLUE, FAINT, GREEN, INK, ORANGE, PAPER, PURPLE, RED, SKY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from sparsetrain.bench.decode_table import DecodeRow

STYLES = {
    "ours": (BLUE, "o"),
    "ours-triton": (BLUE, "s"),
    "flex": (ORANGE, "^"),
    "flex-flash": (RED, "v"),
    "cudnn": (GREEN, "s"),
    "fa2": (SKY, "D"),
    "fa4": (PURPLE, "P"),
    "varlen": (SKY, "D"),
    "sdpa": (GREEN, "s"),
}


def draw(report: Report, out: Path) -> Path:
    """Forward and backward time together, and the rates of both, as a PNG file. Dense implementations are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), layout="constrained")
    figure.suptitle(_title(report), fontsize=12, color=INK)
    time, forward, backward = figure.subplots(1, 3)
    time.set(title="Forward and backward", ylabel="ms", yscale="log")
    forward.set(title="Rate of the forward pass", ylabel="TFLOP/s on visible pairs")
    backward.set(title="Rate of the backward pass", ylabel="TFLOP/s on visible pairs")
    for axes, column in ((time, "both_ms"), (forward, "forward_tflops"), (backward, "backward_tflops")):
        for name in dict.fromkeys(row.name for row in report.rows):
            draw_line(axes, [row for row in report.rows if row.name == name], column, STYLES)
        if axes is not time and report.ceiling_tflops:
            axes.axhline(report.ceiling_tflops, color=FAINT, linestyle=":")
            axes.annotate(
                "matrix product", (0, report.ceiling_tflops), xycoords=axes.get_yaxis_transform(), color=FAINT
            )
        finish(axes, sorted({row.length for row in report.rows}))
    forward.set_ylim(bottom=0)
    backward.set_ylim(bottom=0)
    time.legend(loc="upper left", edgecolor="none")
    figure.savefig(out, dpi=130, facecolor="white")
    return out


def draw_line(axes: Axes, rows: Sequence[Row | DecodeRow], column: str, styles: Mapping[str, tuple[str, str]]) -> None:
    """One implementation. What was not measured, or failed its check, is left out."""
    points = [(row.length, getattr(row, column)) for row in rows if row.check != "failed"]
    points = [(length, value) for length, value in points if value is not None]
    if points:
        color, marker = styles.get(rows[0].name, (INK, "x"))
        style = "-" if rows[0].sparse else "--"
        axes.plot(*zip(*points), color=color, marker=marker, linestyle=style, label=rows[0].title)


def finish(axes: Axes, lengths: list[int]) -> None:
    """The axis of lengths, and the grid."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)


def _title(report: Report) -> str:
    facts, machine = report.options, report.machine
    where = machine.get("gpu") or f"CPU, {machine['cpu_threads']} threads"
    heads = f"{facts['heads']} heads on {facts['kv_heads']} KV heads of {facts['head_dim']}, {facts['dtype']}"
    return f"{facts['subject']}: {heads}; {where}"
