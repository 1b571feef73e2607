"""The pictures of losses on text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from sparsetrain.evaluation.panels import FAINT, PAPER, SERIES, few, label_ends, put_lengths, put_title, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparsetrain.evaluation.text.positions import Bucket

Points = list[tuple[int, float]]


def perplexity_panels(
    perplexities: Mapping[str, Mapping[int, float]],
    positions: Mapping[str, Sequence[Bucket]],
    paired: Sequence[str],
    *,
    ending: str,
    trained_length: int | None,
) -> list[Callable[[Any], None]]:
    """Perplexity against length; and where there are such results, loss against position, and its difference from the
    first result, with two standard errors to either side. Each draws into axes.

    Args:
        perplexities: by result and length.
        positions: losses by result.
        paired: results whose losses are of the same tokens; the others are compared with the first.
        ending: of the titles.
    """
    styles = dict(zip(perplexities, cycle(SERIES)))
    points = {label: sorted(found.items()) for label, found in perplexities.items()}
    title = f"Perplexity by context length{ending}"
    panels: list[Callable[[Any], None]] = [
        lambda axes: draw_by_length(axes, title, "perplexity", points, trained_length)
    ]
    if positions:
        panels.append(lambda axes: _draw_positions(axes, f"Loss by position{ending}", positions, styles))
    if paired:
        panels.append(lambda axes: _draw_differences(axes, positions, paired, styles))
    return panels


def draw_side_by_side(figure: Any, panels: Sequence[Callable[[Any], None]]) -> None:
    """Each panel in axes of its own."""
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)


def _draw_positions(
    axes: Axes, title: str, positions: Mapping[str, Sequence[Bucket]], styles: Mapping[str, tuple[str, str]]
) -> None:
    put_title(axes, title)
    for label, buckets in positions.items():
        color, marker = styles[label]
        middles = [bucket.middle() for bucket in buckets]
        losses = [bucket.losses.mean() for bucket in buckets]
        axes.plot(middles, losses, color=color, marker=marker, linewidth=2, label=label)
    _finish(axes, "loss (nats)", next(iter(positions.values())))


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
    measured, ends = few(points_of), []
    for (label, points), (color, marker) in zip(measured.items(), cycle(SERIES)):
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=2, label=label)
        ends.append((*points[-1], f"{points[-1][1]:.3g}", color))
    values = [value for points in measured.values() for _, value in points]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
    lengths = sorted({length for points in measured.values() for length, _ in points})
    put_lengths(axes, lengths)
    if trained_length is not None:
        axes.axvline(trained_length, color=FAINT, linestyle=":", label="trained length")
    axes.margins(x=0.1)
    axes.set(xlabel="context length (tokens)", ylabel=what)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    axes.legend(loc="best", edgecolor="none")
    label_ends(axes, ends)


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
