"""The picture of a learned selection: which tokens of a row are still read, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

COLUMNS = 1024
"""Most columns of the picture: tokens share one where there are more, and the longest-lived is drawn."""


def selection_picture(lifetimes: Mapping[int, torch.Tensor], out: Path) -> Path:
    """One line a layer and head, tokens from left to right, the brighter the longer a token is read.

    Args:
        lifetimes: by layer, int32 ``[heads, N]``: rows in which a token was read after it had left the window. All of
            one length.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers = sorted(lifetimes)
    heads = lifetimes[layers[0]].shape[0]
    lines = np.concatenate([_binned(lifetimes[layer].cpu().numpy()) for layer in layers])
    tokens = lifetimes[layers[0]].shape[1]
    figure = Figure(figsize=(12, 2.2 + 0.14 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.set_title("How long each token is read after it has left the window")
    shown = np.ma.masked_less(lines, 1)
    image = axes.imshow(
        shown,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(1, max(2, int(lines.max(initial=2)))),
        extent=(0, tokens, len(lines), 0),
    )
    axes.set_facecolor("white")
    axes.set_yticks([(i + 0.5) * heads for i in range(len(layers))], [f"layer {layer}" for layer in layers])
    for i in range(1, len(layers)):
        axes.axhline(i * heads, color="0.8", linewidth=0.6)
    axes.set_xlabel("token (white: forgotten at once)")
    figure.colorbar(image, ax=axes, label="rows")
    figure.savefig(out, dpi=130, facecolor="white")
    return out


def _binned(lines: np.ndarray) -> np.ndarray:
    """``[heads, columns]``: the maximum of equal shares of the tokens."""
    starts = np.unique(np.linspace(0, lines.shape[1], min(COLUMNS, lines.shape[1]), endpoint=False).astype(int))
    return np.maximum.reduceat(lines, starts, axis=1)
