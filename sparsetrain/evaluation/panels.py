"""The panels of pictures: each function draws into given axes or a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes


# Okabe and Ito's colours, distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
SERIES = (("#7F7F7F", "s"), (ORANGE, "^"), (BLUE, "o"), (GREEN, "D"), (PURPLE, "v"), (RED, "P"))
LINES = tuple((color, style) for style in ("-", "--", ":") for color, _ in SERIES)
"""Colour and style of lines that have no markers."""
FOUND = "cividis"
"""The colours of shares from 0 (dark) to 1 (light): the same order with every kind of colour vision, and in grey."""
ON_DARK, ON_LIGHT = "#FAFAFA", "#1A1A1A"
"""Numbers on them."""
INK, FAINT, PAPER = "#333333", "#8A8A8A", "#ECECEC"
MAX_RESULTS = 4
"""Evaluations shown side by side."""

MAX_NUMBERS, MAX_COLUMNS = 120, 9
"""Cells of a map, and its columns, up to which numbers are written into them."""
LINE = 13.0
"""Points from one line of text to the next."""

T = TypeVar("T")


def draw_cells(axes: Axes, shares: np.ndarray, written: str, rows: Sequence[str], columns: Sequence[str]) -> Any:
    """A map of shares ``[rows, columns]`` between 0 and 1, the first row on top; returns what a colour bar needs.

    Args:
        written: the format of the number in a cell, such as ``{:.0%}``. Many cells have none.
    """
    import numpy as np

    image = axes.pcolormesh(shares, cmap=FOUND, vmin=0, vmax=1, edgecolor="white", linewidth=2)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if shares.size <= MAX_NUMBERS and len(columns) <= MAX_COLUMNS:
        for (row, column), share in np.ndenumerate(shares):
            color = ON_LIGHT if share > 0.5 else ON_DARK
            axes.text(column + 0.5, row + 0.5, written.format(share), ha="center", va="center", color=color)
    elif len(columns) > MAX_COLUMNS:
        axes.tick_params(axis="x", labelrotation=90)
    return image


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write beside the ends of lines, moved apart where they would overlap. Limits and scales come first.

    Args:
        ends: x, y, text and colour of each.
    """
    import numpy as np

    ends = [end for end in ends if math.isfinite(end[1])]
    if not ends:
        return
    high = axes.bbox.height / axes.figure.dpi * 72  # in points
    to_axes = axes.transData - axes.transAxes
    order = sorted(range(len(ends)), key=lambda index: ends[index][1])
    heights = [float(to_axes.transform((x, y))[1]) * high for x, y, *_ in (ends[index] for index in order)]
    places = np.array(heights)
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + LINE)
    # Half of what they were moved up by, down.
    places -= (places - heights).mean()
    for index, place, height in zip(order, places, heights, strict=True):
        x, y, text, color = ends[index]
        axes.annotate(text, (x, y), (7, place - height), textcoords="offset points", va="center", color=color)


def put_steps(axes: Axes) -> None:
    """Ticks at whole numbers, with commas."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def put_lengths(axes: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each length, or at some where they are many."""
    axes.set_xscale("log", base=2)
    every = -(-len(lengths) // MAX_COLUMNS)
    shown = lengths[::-every][::-1]
    axes.set_xticks(shown, [short(length) for length in shown])
    axes.minorticks_off()


def pooled(cells: np.ndarray, max_rows: int, max_columns: int) -> np.ndarray:
    """The greatest value of each tile, so that thin diagonals survive a picture with fewer pixels than blocks."""
    import numpy as np

    rows, columns = cells.shape
    tall, wide = -(-rows // max_rows), -(-columns // max_columns)
    padded = np.pad(cells, ((0, -rows % tall), (0, -columns % wide)))
    return padded.reshape(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide).max(axis=(1, 3))


def short(length: int) -> str:
    """A number of tokens: 8192 as 8K, 1536 as 1.5K, 1000 as it is."""
    return f"{length / 1024:g}K" if length >= 1024 and length % 128 == 0 else f"{length:,}"


def put_title(axes: Axes, text: str) -> None:
    """The title of a panel."""
    axes.set_title(text, loc="left", fontweight="bold", color=INK)


def say_instead(axes: Axes, text: str) -> None:
    """A sentence in the place of a picture."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=FAINT)


def few(results: Mapping[str, T]) -> dict[str, T]:
    """The first and the last results, where there are too many to see side by side."""
    if len(results) <= MAX_RESULTS:
        return dict(results)
    labels = list(results)
    return {label: results[label] for label in labels[: MAX_RESULTS // 2] + labels[-MAX_RESULTS // 2 :]}


@dataclass(frozen=True)
class Grid:
    """Percentages by kind and length."""

    kinds: list[str]
    lengths: list[int]
    shares: list[list[float]]
    """``[kind][length]``."""


def draw_grids(figure: Any, grids: Mapping[str, Grid], said: str) -> None:
    """A heat map for each grid, by its title.

    Args:
        said: below them.
    """
    import numpy as np

    all_axes: Sequence[Any] = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (title, grid) in zip(all_axes, grids.items(), strict=True):
        lengths = [short(each) for each in grid.lengths]
        image = draw_cells(axes, np.array(grid.shares) / 100, "{:.0%}", grid.kinds, lengths)
        put_title(axes, title)
        axes.set_xlabel("length (tokens)")
    figure.colorbar(image, ax=all_axes, fraction=0.02, pad=0.01, format="{x:.0%}", ticks=[0, 0.5, 1])
    figure.supxlabel(said, fontsize=9, color=FAINT)
