"""The panels of pictures: each function draws into given axes or a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

from sparsetrain.evaluation.base import LossMarks
from sparsetrain.patterns import Pattern

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from sparsetrain.methods.base import MethodConfig

# Okabe and Ito's colours, distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
SERIES = (("#7F7F7F", "s"), (ORANGE, "^"), (BLUE, "o"), (GREEN, "D"), (PURPLE, "v"), (RED, "P"))
# Of the usual needle-in-a-haystack maps; light enough to read a number on.
MISSED_TO_FOUND = ("#F0496E", "#EBB839", "#0CD79F")
INK, FAINT, PAPER = "#333333", "#8A8A8A", "#ECECEC"
MAX_CELLS = 256
"""Blocks drawn along a side of the mask; longer sequences are pooled."""
MAX_RESULTS = 4
"""Evaluations shown side by side."""

T = TypeVar("T")


def draw_loss(axes: Axes, lines: list[dict[str, Any]], marks: Sequence[LossMarks] = ()) -> None:
    """Loss and learning rate over steps, with what the evaluations between them measured of a loss."""
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    rates = [(line["step"], line["lr"]) for line in lines if line.get("lr") is not None]
    put_title(axes, "Training loss")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    if not losses:
        _say_instead(axes, "no steps recorded")
        return
    axes.spines[["top", "right"]].set_visible(False)
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, color=SKY, alpha=0.6, linewidth=1, label="loss of a step")
    axes.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="smoothed")
    for found, color in zip(marks, cycle((RED, PURPLE, GREEN))):
        _mark_evaluations(axes, found, color)
    axes.grid(True, color=PAPER)
    if rates:
        other = axes.twinx()
        other.plot(*zip(*rates, strict=True), color=FAINT, linestyle="--", linewidth=1.2, label="learning rate")
        other.set_ylabel("learning rate", color=FAINT)
        other.tick_params(colors=FAINT)
        other.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        other.set_ylim(bottom=0)
        other.spines[["top", "left"]].set_visible(False)
        other.spines["right"].set_color(FAINT)
        axes.plot([], [], color=FAINT, linestyle="--", linewidth=1.2, label="learning rate")
    axes.legend(loc="best", edgecolor="none")


def _mark_evaluations(axes: Axes, marks: LossMarks, color: str) -> None:
    """Mark evaluation results on the loss axis, with labels."""
    steps, heights, texts = zip(*marks.points, strict=True)
    axes.plot(steps, heights, "D", color=color, markeredgecolor="white", label=marks.label, clip_on=False)
    for index in {0, len(steps) - 1}:
        place = (steps[index], heights[index])
        text = axes.annotate(texts[index], place, (0, 8), textcoords="offset points", ha="center", color=color)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})


def draw_attention(figure: Any, attention: MethodConfig, length: int, num_layers: int, num_kv_heads: int = 1) -> None:
    """Which blocks see each other, and which reach the last block after each layer.

    Raises:
        ModelError: ``dense_layers`` names a layer that the model does not have.
    """
    pattern = attention.pattern_drawn(length, num_kv_heads)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    if pattern is None:
        _say_instead(left, f"{attention.method} learns its selection: there is no fixed pattern to draw")
        right.set_axis_off()
        return
    _draw_mask(left, attention, pattern, length)
    _draw_reach(right, pattern, length, num_layers, attention.resolve_dense_layers(num_layers))


def _draw_mask(axes: Axes, attention: MethodConfig, pattern: Pattern, length: int) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    num_blocks = -(-length // pattern.block)
    mask = pattern.mask(num_blocks)
    query, key = np.arange(num_blocks)[:, None], np.arange(num_blocks)[None, :]
    # In ascending order of what pooling must not lose.
    kinds = np.where(mask, 2, np.where(key <= query, 1, 0))
    legend = {GREEN: "visible"}
    if hasattr(pattern, "sinks") and hasattr(pattern, "window"):
        kinds[mask & (query - key < pattern.window)] = 3
        kinds[mask & (key < pattern.sinks)] = 4
        legend = {BLUE: "window", ORANGE: "sinks"}
        if (kinds == 2).any():
            legend = {BLUE: "window", GREEN: "far blocks", ORANGE: "sinks"}
    axes.imshow(
        pooled(kinds, MAX_CELLS, MAX_CELLS),
        cmap=ListedColormap([PAPER, "white", GREEN, BLUE, ORANGE]),
        vmin=0,
        vmax=4,
        extent=(0, num_blocks, num_blocks, 0),
        interpolation="nearest",
    )
    _token_ticks(axes.xaxis, num_blocks, pattern.block)
    _token_ticks(axes.yaxis, num_blocks, pattern.block)
    axes.set(xlabel="key (first KV head; the others differ)" if pattern.per_head else "key", ylabel="query")
    put_title(axes, f"{attention.method}: {pattern.density(length):.1%} of full attention at {short(length)} tokens")
    handles = [Patch(color=color, label=label) for color, label in legend.items()]
    if (kinds == 1).any():
        handles.append(Patch(facecolor="white", edgecolor=FAINT, label=f"skipped (blocks of {pattern.block})"))
    axes.legend(handles=handles, loc="upper right", frameon=False)


def _draw_reach(axes: Axes, pattern: Pattern, length: int, num_layers: int, dense_layers: set[int]) -> None:
    from matplotlib.colors import ListedColormap

    num_blocks = -(-length // pattern.block)
    reach = pattern.reach(num_blocks, num_layers, dense_layers)
    shares = reach.mean(axis=1)
    axes.imshow(
        pooled(reach.astype(int), num_layers, MAX_CELLS),
        cmap=ListedColormap([PAPER, BLUE]),
        vmin=0,
        vmax=1,
        extent=(0, num_blocks, num_layers, 0),
        aspect="auto",
        interpolation="nearest",
    )
    for layer in range(1, num_layers):
        axes.axhline(layer, color="white", linewidth=1)
    every = -(-num_layers // 24)
    shown = range(0, num_layers, every)
    middles = [layer + 0.5 for layer in shown]
    axes.set_yticks(middles, [f"{layer + 1} dense" if layer in dense_layers else f"{layer + 1}" for layer in shown])
    _token_ticks(axes.xaxis, num_blocks, pattern.block)
    axes.set(xlabel="position in the input", ylabel="after layer")
    covered = next((layer + 1 for layer, share in enumerate(shares) if share == 1), None)
    outcome = f"all of it after layer {covered}" if covered else f"{shares[-1]:.0%} of it after all {num_layers} layers"
    put_title(axes, f"What has reached the last block: {outcome}")
    coverage = axes.secondary_yaxis("right")
    coverage.set_yticks(middles, [f"{shares[layer]:.0%}" for layer in shown])
    for side in (axes, coverage):
        side.spines[:].set_visible(False)
        side.tick_params(axis="y", length=0)


def pooled(cells: np.ndarray, max_rows: int, max_columns: int) -> np.ndarray:
    """The greatest value of each tile, so that thin diagonals survive a picture with fewer pixels than blocks."""
    import numpy as np

    rows, columns = cells.shape
    tall, wide = -(-rows // max_rows), -(-columns // max_columns)
    padded = np.pad(cells, ((0, -rows % tall), (0, -columns % wide)))
    return padded.reshape(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide).max(axis=(1, 3))


def _token_ticks(axis: Any, num_blocks: int, block: int) -> None:
    ticks = [num_blocks * quarter / 4 for quarter in range(5)]
    axis.set_ticks(ticks, [short(round(tick * block)) for tick in ticks])


def short(length: int) -> str:
    """A number of tokens: 8192 as 8K, 1536 as 1.5K, 1000 as it is."""
    return f"{length / 1024:g}K" if length >= 1024 and length % 128 == 0 else f"{length:,}"


def put_title(axes: Axes, text: str) -> None:
    """The title of a panel."""
    axes.set_title(text, loc="left", fontweight="bold", color=INK)


def _say_instead(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=FAINT)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the run, centred so that it does not lag."""
    half = len(values) // 40
    spans = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(span) / len(span) for span in spans]


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
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("found", MISSED_TO_FOUND)
    all_axes: Sequence[Any] = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (title, grid) in zip(all_axes, grids.items(), strict=True):
        shares = np.array(grid.shares)
        image = axes.pcolormesh(shares, cmap=colors, vmin=0, vmax=100, edgecolor="white", linewidth=2)
        put_title(axes, title)
        axes.set_xticks(np.arange(len(grid.lengths)) + 0.5, [short(each) for each in grid.lengths])
        axes.set_yticks(np.arange(len(grid.kinds)) + 0.5, grid.kinds)
        axes.set_xlabel("length (tokens)")
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(shares):
            axes.text(column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", color=INK)
    figure.colorbar(image, ax=all_axes, fraction=0.02, pad=0.01, ticks=[0, 50, 100])
    figure.supxlabel(said, fontsize=9, color=FAINT)
