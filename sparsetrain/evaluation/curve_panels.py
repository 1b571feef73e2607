"""Panels with curves: loss and speed over steps, accuracy against length, shares by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from typing import TYPE_CHECKING, Any

from sparsetrain.evaluation.base import LossMarks, Share
from sparsetrain.evaluation.metrics import Metrics, Points, thinned
from sparsetrain.evaluation.panels import (
    BLUE,
    FAINT,
    GREEN,
    LINES,
    PAPER,
    PURPLE,
    RED,
    SERIES,
    SKY,
    put_lengths,
    put_steps,
    put_title,
    say_instead,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 800
"""Points of a curve that are drawn; with more, the lowest and the highest of each part of the run."""
ASIDE = 0.04
"""Octaves between the points of two results at one length."""
BELOW = 0.5
"""Inches from the axes to a legend below their ticks and label."""
MOST_LETTERS = 46
"""Letters of two labels side by side below the narrowest axes."""
ENOUGH = 40
"""Steps from which on a curve is smoothed."""


def draw_loss(axes: Axes, metrics: Metrics, marks: Sequence[LossMarks] = ()) -> None:
    """Loss and learning rate over steps, with what the evaluations between them measured of a loss."""
    losses, rates = metrics.curves["loss"], metrics.curves["lr"]
    put_title(axes, "Training loss")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    if not losses:
        say_instead(axes, "no steps recorded")
        return
    axes.spines[["top", "right"]].set_visible(False)
    drawn, smoothed = thinned(losses, MAX_POINTS), smooth(losses)
    if smoothed is None:
        axes.plot(*zip(*drawn, strict=True), color=BLUE, linewidth=2, marker=_marker(drawn), label="loss of a step")
    else:
        axes.plot(*zip(*drawn, strict=True), color=SKY, alpha=0.6, linewidth=1, label="loss of a step")
        axes.plot(*zip(*smoothed, strict=True), color=BLUE, linewidth=2, label="smoothed")
    for found, color in zip(marks, cycle((RED, PURPLE, GREEN))):
        _mark_evaluations(axes, found, color)
    axes.grid(True, color=PAPER)
    if rates:
        other = axes.twinx()
        points = thinned(rates, MAX_POINTS)
        other.plot(*zip(*points, strict=True), color=FAINT, linestyle="--", linewidth=1.2, label="learning rate")
        other.set_ylabel("learning rate", color=FAINT)
        other.tick_params(colors=FAINT)
        # No power of ten above the axis: the mark of the last evaluation may be there.
        other.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        other.set_ylim(bottom=0)
        other.spines[["top", "left"]].set_visible(False)
        other.spines["right"].set_color(FAINT)
        axes.plot([], [], color=FAINT, linestyle="--", linewidth=1.2, label="learning rate")
    put_steps(axes)
    _put_legend(axes)


def draw_curves(axes: Axes, title: str, ylabel: str, curves: Mapping[str, Points]) -> None:
    """The same metric of several runs over steps; smoothed where there are enough steps."""
    put_title(axes, title)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    for (label, points), (color, style) in zip(curves.items(), cycle(LINES if len(curves) > 1 else [(BLUE, "-")])):
        shown = smooth(points) or points
        drawn = thinned(shown, MAX_POINTS)
        axes.plot(*zip(*drawn, strict=True), color=color, linestyle=style, marker=_marker(drawn), label=label)
    axes.grid(True, color=PAPER)
    axes.yaxis.set_major_formatter("{x:,g}")
    put_steps(axes)
    if len(curves) > 1:
        axes.legend(loc="best", edgecolor="none")


def draw_accuracy(
    axes: Axes, title: str, measured: Mapping[str, Mapping[int, Share]], trained_length: int | None
) -> None:
    """The share of right answers against length with its 95 % interval, a line for each result."""
    put_title(axes, title)
    lengths = sorted({length for found in measured.values() for length in found})
    for index, ((label, found), (color, marker)) in enumerate(zip(measured.items(), cycle(SERIES))):
        shares, low, high = zip(*(share for _, share in sorted(found.items())), strict=True)
        # Beside one another: many results are equal.
        places = [length * 2 ** (ASIDE * (index - (len(measured) - 1) / 2)) for length in sorted(found)]
        axes.plot(places, shares, color=color, marker=marker, linewidth=1.5, label=label, clip_on=False, zorder=3)
        axes.vlines(places, low, high, color=color, linewidth=2.5, alpha=0.45)
    if trained_length is not None:
        axes.axvline(trained_length, color=FAINT, linestyle=":", label="trained length")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set(xlabel="length (tokens)", ylabel="found, with 95 % interval")
    put_lengths(axes, lengths)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    _put_legend(axes)


def draw_layers(axes: Axes, title: str, ylabel: str, values: Mapping[str, Mapping[int, float]]) -> None:
    """Shares by layer, a line of markers for each name."""
    put_title(axes, title)
    for (label, found), (color, marker) in zip(values.items(), cycle(SERIES if len(values) > 1 else [(BLUE, "o")])):
        layers = sorted(found)
        axes.plot(layers, [found[layer] for layer in layers], color=color, marker=marker, linewidth=1, label=label)
    axes.set_ylim(bottom=0, top=max(1.02, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set(xlabel="layer", ylabel=ylabel)
    put_steps(axes)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    if len(values) > 1:
        axes.legend(loc="best", edgecolor="none")


def smooth(points: Points) -> Points | None:
    """Running mean over a twentieth of the run, centred so that it does not lag; None where the steps are too few."""
    if len(points) < ENOUGH:
        return None
    half = len(points) // 40
    sums = list(accumulate((value for _, value in points), initial=0.0))
    found = []
    for index, (step, _) in enumerate(points):
        low, high = max(0, index - half), min(len(points), index + half + 1)
        found.append((step, (sums[high] - sums[low]) / (high - low)))
    return found


def _put_legend(axes: Axes) -> None:
    """Below the axes, where it covers neither lines nor the labels of points."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -BELOW, axes.figure.dpi_scale_trans)
    place: Any = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below, "borderaxespad": 0}
    labels = axes.get_legend_handles_labels()[1]
    half = -(-len(labels) // 2)
    letters = sum(max(map(len, column), default=0) for column in (labels[:half], labels[half:]))
    axes.legend(**place, ncols=2 if letters <= MOST_LETTERS else 1, frameon=False, fontsize=9)


def _marker(points: Points) -> str:
    """A line through one point is not seen."""
    return "o" if len(points) < 3 else ""


def _mark_evaluations(axes: Axes, marks: LossMarks, color: str) -> None:
    """Mark evaluation results on the loss axis, with labels at the ends."""
    steps, heights, texts = zip(*marks.points, strict=True)
    axes.plot(steps, heights, "D", color=color, markeredgecolor="white", label=marks.label, clip_on=False)
    left, right = axes.get_xlim()
    apart = steps[-1] - steps[0] > 0.2 * (right - left)
    for index, side in ((0, "left"), (len(steps) - 1, "right")) if apart else ((len(steps) - 1, "right"),):
        place = (steps[index], heights[index])
        text = axes.annotate(texts[index], place, (0, 8), textcoords="offset points", ha=side, color=color)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
