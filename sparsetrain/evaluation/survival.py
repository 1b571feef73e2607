"""The panel of a learned selection: how long the tokens of a row are read. Kept in a small file beside the pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self
from zipfile import BadZipFile

from sparsetrain.durable import read_bytes, write_whole
from sparsetrain.evaluation.panels import pooled, put_title

if TYPE_CHECKING:
    import numpy as np
    import torch
    from matplotlib.figure import Figure

SURVIVAL_FILE = "selection.npz"
COLUMNS = 1024
"""Maximum number of columns of the picture; with more tokens, each column shows the maximum of several."""
HEAD = 0.14
"""Inches of the picture for a head."""


class Survival(NamedTuple):
    """Lifetimes of the tokens of a row: in how many rows a token was read after it had left the window."""

    layers: np.ndarray
    """Indices of the layers, int32 ``[L]``."""
    lifetimes: np.ndarray
    """The longest of each column of tokens, int32 ``[L * heads, columns]``."""
    tokens: int

    @classmethod
    def of(cls, lifetimes: Mapping[int, torch.Tensor]) -> Self:
        """By layer, int32 ``[heads, N]`` (:meth:`Method.lifetimes`). All are of one shape."""
        import numpy as np
        import torch

        layers = sorted(lifetimes)
        lines = torch.cat([lifetimes[layer] for layer in layers]).cpu().numpy().astype(np.int32)
        return cls(np.array(layers, dtype=np.int32), pooled(lines, len(lines), COLUMNS), lines.shape[1])

    def save(self, file: Path) -> None:
        """Write the file that :meth:`load` reads.

        Raises:
            OSError: it cannot be written.
        """
        import numpy as np

        content = io.BytesIO()
        np.savez_compressed(content, **self._asdict())
        write_whole(file, content.getvalue())

    @classmethod
    def load(cls, file: Path) -> Self | None:
        """Read what :meth:`save` wrote; None if there is no file.

        Raises:
            ValueError: the file holds something else.
        """
        import numpy as np

        try:
            with np.load(io.BytesIO(read_bytes(file)), allow_pickle=False) as held:
                found = cls(held["layers"], held["lifetimes"], int(held["tokens"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, BadZipFile) as error:
            raise ValueError(f"{file} does not hold lifetimes of tokens") from error
        rows = found.lifetimes.shape[0] if found.lifetimes.ndim == 2 else 0
        whole = found.layers.ndim == 1 and found.layers.size and rows and rows % found.layers.size == 0
        if not whole or found.lifetimes.dtype.kind != "i" or found.tokens < 1 or not found.lifetimes.size:
            raise ValueError(f"{file} does not hold lifetimes of tokens")
        return found

    @property
    def height(self) -> float:
        """Inches of the picture."""
        return 2.2 + HEAD * len(self.lifetimes)


def draw_survival(figure: Figure, survival: Survival) -> None:
    """One row per layer and head, tokens from left to right; brighter means that a token is read longer."""
    import numpy as np
    from matplotlib.colors import LogNorm

    lines, tokens = survival.lifetimes, survival.tokens
    heads = len(lines) // len(survival.layers)
    axes = figure.subplots()
    put_title(axes, "How long each token is read after it has left the window")
    image = axes.imshow(
        np.ma.masked_less(lines, 1),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(1, max(2, int(lines.max(initial=2)))),
        extent=(0, lines.shape[1] * -(-tokens // COLUMNS), len(lines), 0),
    )
    axes.set_xlim(0, tokens)
    every = -(-len(survival.layers) // 24)
    shown = range(0, len(survival.layers), every)
    axes.set_yticks([(i + 0.5) * heads for i in shown], [f"layer {survival.layers[i]}" for i in shown])
    for i in range(1, len(survival.layers)):
        axes.axhline(i * heads, color="0.8", linewidth=0.6)
    axes.set_xlabel("token (empty: forgotten at once)")
    figure.colorbar(image, ax=axes, label="rows", format="{x:,.0f}")
