"""Panels of a block pattern: which blocks see each other, and which reach the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsetrain.evaluation.panels import BLUE, FAINT, GREEN, ORANGE, pooled, put_title, say_instead, short
from sparsetrain.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparsetrain.methods.base import MethodConfig

AHEAD = "#8A8A8A28"
"""Keys after the query, as a tint of the page."""
MAX_CELLS = 256
"""Blocks drawn along a side of the mask; longer sequences are pooled."""


def draw_attention(figure: Any, attention: MethodConfig, length: int, num_layers: int, num_kv_heads: int = 1) -> None:
    """Which blocks see each other, and which reach the last block after each layer.

    Raises:
        ModelError: ``dense_layers`` names a layer that the model does not have.
    """
    pattern = attention.pattern_drawn(length, num_kv_heads)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    if pattern is None:
        say_instead(left, f"{attention.method} learns its selection: there is no fixed pattern to draw")
        right.set_axis_off()
        return
    draw_mask(left, attention, pattern, length)
    draw_reach(right, pattern, length, num_layers, attention.resolve_dense_layers(num_layers))


def draw_mask(axes: Axes, attention: MethodConfig, pattern: Pattern, length: int) -> None:
    """Which blocks see each other."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    num_blocks = -(-length // pattern.block)
    shown = pattern.by_layer[0]
    mask = shown.mask(num_blocks)
    query, key = np.arange(num_blocks)[:, None], np.arange(num_blocks)[None, :]
    # In ascending order of what pooling must not lose.
    kinds = np.where(mask, 2, np.where(key <= query, 1, 0))
    legend = {GREEN: "visible"}
    if hasattr(shown, "sinks") and hasattr(shown, "window"):
        kinds[mask & (query - key < shown.window)] = 3
        kinds[mask & (key < shown.sinks)] = 4
        legend = {BLUE: "window", ORANGE: "sinks"}
        if (kinds == 2).any():
            legend = {BLUE: "window", GREEN: "far blocks", ORANGE: "sinks"}
    axes.imshow(
        pooled(kinds, MAX_CELLS, MAX_CELLS),
        cmap=ListedColormap([AHEAD, "none", GREEN, BLUE, ORANGE]),
        vmin=0,
        vmax=4,
        extent=(0, num_blocks, num_blocks, 0),
        interpolation="nearest",
    )
    _token_ticks(axes.xaxis, num_blocks, pattern.block)
    _token_ticks(axes.yaxis, num_blocks, pattern.block)
    first = "KV head" if pattern.per_head else "layer" if len(pattern.by_layer) > 1 else None
    axes.set(xlabel="key" if first is None else f"key (first {first}; the others differ)", ylabel="query")
    share = pattern.mean_density(length)
    put_title(axes, f"{attention.method}: {share:.1%} of full attention at {short(length)} tokens")
    handles = [Patch(color=color, label=label) for color, label in legend.items()]
    if (kinds == 1).any():
        handles.append(Patch(facecolor="none", edgecolor=FAINT, label=f"skipped (blocks of {pattern.block})"))
    axes.legend(handles=handles, loc="upper right", frameon=False)


def draw_reach(axes: Axes, pattern: Pattern, length: int, num_layers: int, dense_layers: set[int]) -> None:
    """Which blocks reach the last one after each layer."""
    from matplotlib.colors import ListedColormap

    num_blocks = -(-length // pattern.block)
    reach = pattern.reach(num_blocks, num_layers, dense_layers)
    shares = reach.mean(axis=1)
    axes.imshow(
        pooled(reach.astype(int), num_layers, MAX_CELLS),
        cmap=ListedColormap([AHEAD, BLUE]),
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


def _token_ticks(axis: Any, num_blocks: int, block: int) -> None:
    ticks = [num_blocks * quarter / 4 for quarter in range(5)]
    axis.set_ticks(ticks, [short(round(tick * block)) for tick in ticks])
