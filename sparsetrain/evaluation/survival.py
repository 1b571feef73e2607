"""The panel of a learned selection: how long the tokens of a row are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from sparsetrain.evaluation.panels import pooled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 1024
"""Maximum number of columns of the picture; with more tokens, each column shows the maximum of several."""


def draw_survival(figure: Figure, lifetimes: Mapping[int, torch.Tensor]) -> None:
    """One row per layer and head, tokens from left to right; brighter means that a token is read longer.

    Args:
        lifetimes: by layer, int32 ``[heads, N]``: rows in which a token was read after it had left the window. All of
            one shape.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    layers = sorted(lifetimes)
    lines = torch.cat([lifetimes[layer] for layer in layers]).cpu().numpy()
    heads, tokens = len(lines) // len(layers), lines.shape[1]
    axes = figure.subplots()
    axes.set_title("How long each token is read after it has left the window")
    columns = pooled(lines, len(lines), COLUMNS)
    image = axes.imshow(
        np.ma.masked_less(columns, 1),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(1, max(2, int(lines.max(initial=2)))),
        extent=(0, columns.shape[1] * -(-tokens // COLUMNS), len(lines), 0),
    )
    axes.set_xlim(0, tokens)
    axes.set_facecolor("white")
    axes.set_yticks([(i + 0.5) * heads for i in range(len(layers))], [f"layer {layer}" for layer in layers])
    for i in range(1, len(layers)):
        axes.axhline(i * heads, color="0.8", linewidth=0.6)
    axes.set_xlabel("token (white: forgotten at once)")
    figure.colorbar(image, ax=axes, label="rows")
