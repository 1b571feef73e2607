"""The charts of SparseK's time and rates against length, drawn from the table of docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from crossover import LENGTHS, number, tables
from svg import FAR, FIFTH, WINDOW, drawing, legend, line, text

COLOURS = {"sparsetrain": WINDOW, "cuDNN, dense": FAR, "FlashAttention 4, dense": FIFTH}
TALL, WIDTH, GAP, LEFT, TOP = 220, 220, 62, 48, 92
FASTEST = 700.0
"""TFLOP/s at the top of both charts of rates."""


def panels() -> dict[str, dict[str, dict[int, float]]]:
    """What is drawn: by title and implementation, the number at each length."""
    table = tables("SparseK")[0]
    times, rates = table[0].index("forward + backward ms"), table[0].index("TFLOP/s forward, backward")
    found: dict[str, dict[str, dict[int, float]]] = {
        "both passes, ms": {},
        "forward, TFLOP/s": {},
        "backward, TFLOP/s": {},
    }
    length = 0
    for row in table[2:]:
        length = int(number(row[0])) if row[0] else length
        name = row[1].replace("*", "").partition(" (")[0]
        told = [number(row[times]), *(number(each) for each in row[rates].split(", "))]
        for points, value in zip(found.values(), told, strict=True):
            points.setdefault(name, {})[length] = value
    return found


def sparsek_speed() -> str:
    """Three charts beside one another; lengths and times are logarithmic."""
    parts = legend(LEFT, 6, COLOURS)
    for place, (title, names) in enumerate(panels().items()):
        most = max(value for points in names.values() for value in points.values())
        if "ms" in title:
            marks, up = [1.0, 10.0, 100.0, 1000.0, 10000.0], _logarithmic(1.0, most)
        else:
            marks, up = [100.0 * each for each in range(8)], _linear(max(FASTEST, most))
        parts += _panel(LEFT + place * (WIDTH + GAP), title, names, marks, up)
    across = LEFT + 3 * WIDTH + 2 * GAP + 10
    return drawing(across, TOP + TALL + 46, "time and rates of SparseK and of dense attention against length", parts)


def _linear(most: float) -> Callable[[float], float]:
    return lambda value: TOP + TALL - TALL * value / (1.05 * most)


def _logarithmic(least: float, most: float) -> Callable[[float], float]:
    span = math.log(1.3 * most / least)
    return lambda value: TOP + TALL - TALL * math.log(value / least) / span


def _panel(
    left: float, title: str, names: dict[str, dict[int, float]], marks: list[float], up: Callable[[float], float]
) -> list[str]:
    def across(length: float) -> float:
        share = math.log(length / LENGTHS[0]) / math.log(LENGTHS[-1] / LENGTHS[0])
        return left + 14 + (WIDTH - 28) * share

    parts = [text(left + WIDTH / 2, TOP - 6, title, "middle")]
    for mark in marks:
        parts.append(line(left, up(mark), left + WIDTH, up(mark), width=0.25))
        parts.append(text(left - 6, up(mark) + 4, f"{mark:,.0f}", "end", size=12))
    for length in LENGTHS:
        parts.append(text(across(length), TOP + TALL + 18, f"{length // 1024}K", "middle", size=12))
    for name, points in names.items():
        ends, colour = sorted(points), COLOURS[name]
        for a, b in pairwise(ends):
            parts.append(line(across(a), up(points[a]), across(b), up(points[b]), colour, 2.5))
        for length in ends:
            parts.append(f'<circle cx="{across(length):.1f}" cy="{up(points[length]):.1f}" r="4" fill="{colour}"/>')
    parts.append(text(left + WIDTH / 2, TOP + TALL + 38, "tokens of a row", "middle", size=12))
    return parts
