"""The pictures of losses on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from sparsetrain.evaluation.panels import FAINT, PAPER, SERIES, few, put_title, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparsetrain.evaluation.text.positions import Bucket

Points = list[tuple[int, float]]


def draw_perplexity(
    figure: Any,
    perplexities: Mapping[str, Mapping[int, float]],
    positions: Mapping[str, Sequence[Bucket]],
    paired: Sequence[str],
    *,
    ending: str,
    trained_length: int | None,
) -> None:
    """Perplexity against length; beside it, where there are such results, loss against position, and its difference
    from the first result, with two standard errors to either side.

    Args:
        perplexities: by result and length.
        positions: losses by result.
        paired: results whose losses are of the same tokens; the others are compared with the first.
        ending: of the titles.
    """
    panels = iter(figure.subplots(1, 1 + bool(positions) + bool(paired), squeeze=False)[0])
    styles = dict(zip(perplexities, cycle(SERIES)))
    points = {label: sorted(found.items()) for label, found in perplexities.items()}
    draw_by_length(next(panels), f"Perplexity by context length{ending}", "perplexity", points, trained_length)
    if positions:
        axes = next(panels)
        put_title(axes, f"Loss by position{ending}")
        for label, buckets in positions.items():
            color, marker = styles[label]
            middles = [bucket.middle() for bucket in buckets]
            losses = [bucket.losses.mean() for bucket in buckets]
            axes.plot(middles, losses, color=color, marker=marker, linewidth=2, label=label)
        _finish(axes, "loss (nats)", next(iter(positions.values())))
    if paired:
        _draw_differences(next(panels), positions, paired, styles)


def _draw_differences(
    axes: Axes, positions: Mapping[str, Sequence[Bucket]], paired: Sequence[str], styles: Mapping[str, tuple[str, str]]
) -> None:
    first, *others = paired
    put_title(axes, f"Loss minus that of {first}")
    axes.axhline(0, color=FAINT, linewidth=1)
    for label in others:
        color, marker = styles[label]
        pairs = list(zip(positions[label], positions[first], strict=True))
        middles = [mine.middle() for mine, _ in pairs]
        found = [mine.losses.difference(theirs.losses) for mine, theirs in pairs]
        means, bars = [mean for mean, _ in found], [2 * error for _, error in found]
        axes.errorbar(middles, means, bars, color=color, marker=marker, linewidth=2, capsize=3, label=label)
    _finish(axes, "difference (nats), ± 2 standard errors", positions[first])


def draw_by_length(
    axes: Axes, title: str, what: str, points_of: Mapping[str, Points], trained_length: int | None
) -> None:
    """A perplexity against length, a line for each result."""
    from matplotlib.ticker import LogLocator

    put_title(axes, title)
    measured = few(points_of)
    for (label, points), (color, marker) in zip(measured.items(), cycle(SERIES)):
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=2, label=label)
        end = f"{points[-1][1]:.3g}"
        axes.annotate(end, points[-1], (7, 0), textcoords="offset points", va="center", color=color)
    values = [value for points in measured.values() for _, value in points]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
    lengths = sorted({length for points in measured.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    if trained_length is not None:
        axes.axvline(trained_length, color=FAINT, linestyle=":", label="trained length")
    axes.margins(x=0.1)
    axes.set(xlabel="context length (tokens)", ylabel=what)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    axes.legend(loc="best", edgecolor="none")


def _finish(axes: Axes, ylabel: str, buckets: Sequence[Bucket]) -> None:
    widths = [bucket.stop - bucket.first for bucket in buckets]
    if max(widths) > 4 * min(widths):  # buckets that double, and not equal ones
        axes.set_xscale("log", base=2)
        low, high = axes.get_xlim()
        ticks = [2**power for power in range(0, 28, 2) if low <= 2**power <= high]
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.minorticks_off()
    else:
        stop = buckets[-1].stop
        ticks = [stop * quarter // 4 for quarter in range(5)]
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
    axes.set(xlabel="tokens before the token", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    axes.legend(loc="best", edgecolor="none")
