"""The chart of speed against length, drawn from tables of docs/performance.md and kernels/README.md."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

from svg import CHOICE, FAR, FIFTH, SINK, WINDOW, drawing, line, rectangle, text

PAGE = Path(__file__).resolve().parents[1] / "performance.md"
KERNELS = PAGE.parents[1] / "kernels/README.md"
LENGTHS = (8192, 32768, 131072, 524288)
SPEEDS = (0.5, 1, 2, 5, 10, 20, 50, 100)
WIDTH, TALL, X, Y = 390, 300, 40, 14


def tables(heading: str) -> list[list[list[str]]]:
    """The tables below a heading of the page, as cells.

    Raises:
        LookupError: the page has no such heading.
    """
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    if found is None:
        raise LookupError(f"docs/performance.md has no section {heading!r}; docs/generate/crossover.py reads it")
    blocks = re.findall(r"(?:^\|.*\n)+", found[1], re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()] for block in blocks]


def number(cell: str) -> float:
    return float(cell.replace(",", "").replace("*", ""))


def kernels(heading: str) -> dict[int, float]:
    """Dense attention's time over ours for each length, forward and backward, of the section's first table."""
    table = tables(heading)[0]
    column = table[0].index("forward + backward ms")
    times: dict[int, dict[str, float]] = {}
    length = 0
    for row in table[2:]:
        length = int(number(row[0])) if row[0] else length
        times.setdefault(length, {})[row[1].partition(" (")[0]] = number(row[column])
    return {length: each["cuDNN, dense"] / each["**sparsetrain**"] for length, each in times.items()}


def step(model: str) -> dict[int, float]:
    """The time of a whole step with full attention over that with PowerAttention."""
    table = tables("A training step")[0]
    start = next(place for place, row in enumerate(table) if row[0].startswith(f"**{model}"))
    rows = {row[0]: row for row in table[start + 1 : start + 6]}
    full, ours = rows["ours, full attention"], rows["**ours, power**"]
    return {32768: number(full[1]) / number(ours[1]), 131072: number(full[4]) / number(ours[4])}


def recycled() -> dict[int, float]:
    """Dense attention's time over that of recycled attention.

    Raises:
        LookupError: kernels/README.md has no such table.
    """
    found = re.search(
        r"^\| \| ([\d,]+ tokens.*)\n(?:\|.*\n)+?\| times as fast \|(.*)", KERNELS.read_text("utf-8"), re.M
    )
    if found is None:
        raise LookupError("kernels/README.md has no row 'times as fast'; docs/generate/crossover.py reads it")
    lengths = [number(length) for length in re.findall(r"([\d,]+) tokens", found[1])]
    return dict(zip(map(int, lengths), (number(cell) for cell in found[2].strip("| ").split("|"))))


def series() -> dict[str, dict[int, float]]:
    """What is drawn: speed over the dense one, by length."""
    return {
        "PowerAttention": kernels("PowerAttention, forward and backward"),
        "SparseK": kernels("SparseK"),
        "recycled": recycled(),
        "step, 1B": step("Llama-3.2-1B"),
        "step, 8B LoRA": step("Qwen3-8B"),
    }


def crossover() -> str:
    """The chart: how many times as fast as dense attention, against the length of the row; both logarithmic."""
    right, low, high = X + WIDTH, math.log(SPEEDS[0]), math.log(SPEEDS[-1] * 1.3)

    def across(length: float) -> float:
        start, end = math.log(LENGTHS[0]), math.log(LENGTHS[-1])
        return X + 20 + (WIDTH - 40) * (math.log(length) - start) / (end - start)

    def up(speed: float) -> float:
        return Y + TALL - TALL * (math.log(speed) - low) / (high - low)

    parts = [rectangle(X, up(1), WIDTH, Y + TALL - up(1), "#80808022")]
    for speed in SPEEDS:
        parts.append(line(X, up(speed), right, up(speed), width=1.6 if speed == 1 else 0.25))
        parts.append(text(X - 6, up(speed) + 4, f"{speed:g}x", "end", size=12))
    for length in LENGTHS:
        parts.append(text(across(length), Y + TALL + 18, f"{length // 1024}K", "middle", size=12))
    parts.append(text(right - 4, up(1) + 16, "dense is faster", "end", size=12))
    for (name, points), colour in zip(series().items(), (WINDOW, FAR, FIFTH, SINK, CHOICE)):
        ends = sorted(points)
        for a, b in pairwise(ends):
            parts.append(line(across(a), up(points[a]), across(b), up(points[b]), colour, 2.5))
        for length in ends:
            parts.append(f'<circle cx="{across(length):.1f}" cy="{up(points[length]):.1f}" r="4" fill="{colour}"/>')
        right_of, above = ("start", 9), {"recycled": 4, "step, 1B": -2, "step, 8B LoRA": 13}.get(name)
        anchor, shift = ("end", -6) if above is None else right_of
        parts.append(text(across(ends[-1]) + shift, up(points[ends[-1]]) + (above or -9), name, anchor))
    parts.append(text(X + WIDTH / 2, Y + TALL + 38, "tokens of a row", "middle", size=12))
    return drawing(right + 8, Y + TALL + 46, "times as fast as dense attention, against the length of a row", parts)
