"""A comparison of decode settings as a table, as files, and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.durable import write_whole
from sparsetrain.evaluation.decode_comparison import DENSE, DecodeRow
from sparsetrain.evaluation.panels import BLUE, FAINT, GREEN, INK, ORANGE, PAPER, PURPLE, RED, SKY, put_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADINGS = (
    "setting",
    "keys read",
    "bytes read",
    "bytes a token and layer",
    "accuracy",
    "error of a layer",
    "softmax weight",
    "output length",
    "ended: all, right, wrong",
)
COLORS = (GREEN, BLUE, ORANGE, PURPLE, RED, SKY, "#7F7F7F")
ORACLE = "oracle"


def blocks(rows: Sequence[DecodeRow]) -> dict[str, list[list[str]]]:
    """Cells of the rows by title: those as published, and those of each budget."""
    found: dict[str, list[list[str]]] = {}
    for row in rows:
        title = "As published or given" if row.budget is None else f"At most {100 * row.budget:g}% of the bytes"
        found.setdefault(title, []).append(_cells(row))
    return found


def markdown(rows: Sequence[DecodeRow]) -> str:
    """All blocks as tables of Markdown."""
    lines: list[str] = []
    for title, cells in blocks(rows).items():
        lines += [f"{title}:", "", _line(HEADINGS), _line(["---", *["---:"] * (len(HEADINGS) - 1)])]
        lines += [*map(_line, cells), ""]
    return "\n".join(lines)


def write(folder: Path, rows: Sequence[DecodeRow], facts: dict[str, Any]) -> None:
    """Write ``decode.json``, ``decode.csv`` and ``decode.md``, in the place of those of fewer rows.

    Args:
        facts: of the comparison, such as the model, for the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = [row.model_dump(mode="json") for row in rows]
    write_whole(folder / "decode.json", json.dumps({**facts, "rows": values}, indent=1) + "\n")
    write_whole(folder / "decode.csv", _csv(values))
    write_whole(folder / "decode.md", markdown(rows))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: DecodeRow) -> list[str]:
    read = [f"{row.keys_share:.1%}", f"{row.bytes_share:.1%}", f"{row.bytes:,.0f}"]
    if row.accuracy is None:
        return [row.name, *read, "does not fit", "", "", "", ""]
    accuracy = f"{row.accuracy:.1%}"
    if row.standard_error is not None:
        accuracy += f" ± {row.standard_error:.1%}"
    length = "" if row.output_length is None else f"{row.output_length:.1f}"
    lost = ["" if row.error is None else f"{row.error:.3f}", "" if row.mass is None else f"{row.mass:.1%}"]
    return [row.name, *read, accuracy, *lost, length, _ended(row)]


def _ended(row: DecodeRow) -> str:
    """The share of answers that the model ended, and how long the right and the wrong ones of them are."""
    if row.ended is None:
        return ""
    lengths = ("-" if each is None else f"{each:.1f}" for each in (row.length_right, row.length_wrong))
    return ", ".join([f"{row.ended:.0%}", *lengths])


def _csv(values: list[dict[str, Any]]) -> str:
    layers = sorted({layer for row in values for layer in row["error_by_layer"]}, key=int)
    out = io.StringIO()
    names = [name for name in values[0] if name != "error_by_layer"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *(f"error of layer {layer}" for layer in layers)])
    for row in values:
        cells = [json.dumps(row[name]) if name == "section" else row[name] for name in names]
        writer.writerow([*cells, *(row["error_by_layer"].get(layer) for layer in layers)])
    return out.getvalue()


def draw(rows: Sequence[DecodeRow], title: str, out: Path) -> None:
    """Draw accuracy and error against the bytes read: a line for each setting, over its budgets or the fields that were
    given, and hollow marks as published."""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(title, fontsize=12, color=INK, wrap=True)
    left, right = figure.subplots(1, 2)
    put_title(left, "Answers found")
    put_title(right, "Error of a layer's output")
    left.set_ylim(-0.03, 1.03)
    right.set_yscale("symlog", linthresh=0.01)
    for axes, field in ((left, "accuracy"), (right, "error")):
        _draw_lines(axes, rows, field)
        axes.set_xscale("log", base=2)
        ticks = [2.0**-power for power in range(6)]
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xlabel("bytes read, of those that full attention reads")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=PAPER)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", edgecolor="none")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, facecolor="white")
    write_whole(out, drawn.getvalue())


def _draw_lines(axes: Axes, rows: Sequence[DecodeRow], field: str) -> None:
    measured = [row for row in rows if row.accuracy is not None and getattr(row, field) is not None]
    dense = next(row for row in measured if row.name == DENSE)
    axes.axhline(getattr(dense, field), color=FAINT, linestyle=":", label=DENSE)
    names = list(dict.fromkeys(_family(row) for row in measured if row.name != DENSE))
    plain = [name for name in names if not name.startswith(ORACLE)]
    for name in names:
        color = INK if name not in plain else COLORS[plain.index(name) % len(COLORS)]
        marker = "o" if name in plain else "x" if name.endswith("k") else "+"
        own = [row for row in measured if _family(row) == name]
        fitted = sorted((row.bytes_share, getattr(row, field)) for row in own if row.budget or row.name != name)
        shares, values = zip(*fitted, strict=True) if fitted else ((), ())
        axes.plot(shares, values, color=color, marker=marker, label=name)
        for row in own:
            if row.name == name and row.budget is None:
                axes.plot(row.bytes_share, getattr(row, field), color=color, marker="o", markerfacecolor="white")


def _family(row: DecodeRow) -> str:
    """The name of a setting without the fields that were given."""
    return row.name.partition(",")[0]
