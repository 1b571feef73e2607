"""The result of the task ``receptive_field``: numbers, tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import Drawing, Rows, TaskReport, TaskResult

HALF = 0.5
"""Of a cell whose key the last token depends on in fewer prompts than this share, it cannot know."""


class FieldMap(BaseModel):
    """The prompts of one length. Shares are ``[layer][block]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    accuracy: list[list[float]]
    """Held-out prompts whose digit the probe names."""
    control: list[list[float]]
    """The same with shuffled labels."""
    reached: list[list[float]] | None
    """Prompts whose key the last token depends on after the layer, by the pattern; None where there is none."""
    field: list[float] | None
    """Share of the pattern's blocks on which the last token depends after each layer."""

    def last(self) -> float:
        """Accuracy after the last layer, in the mean over blocks."""
        return _mean(self.accuracy[-1])

    def chance(self) -> float:
        """That of the control over all cells."""
        return _mean([share for row in self.control for share in row])

    def where(self, reached: bool) -> float:
        """Accuracy of all cells whose key the last token depends on, or of the others; NaN where there are none."""
        if self.reached is None:
            return math.nan
        cells = zip(chain(*self.accuracy), chain(*self.reached), strict=True)
        return _mean([share for share, known in cells if (known >= HALF) == reached and (reached or known == 0)])


class ReceptiveFieldResult(TaskResult):
    """What a linear probe finds in the last token's hidden states, by length, layer and block."""

    wide = True

    task: Literal["receptive_field"] = "receptive_field"
    maps: dict[int, FieldMap]
    """By tokens of a prompt."""
    blocks: int
    """Parts of a prompt."""
    samples: int
    """Prompts for each part."""

    def metrics(self) -> dict[str, float]:
        """Accuracy after the last layer, over all blocks and by length; the control; where the key is in the field of
        the pattern, and where it is not."""
        numbers = {"": self.score()}
        for length, found in self.maps.items():
            numbers |= {f"/{length}": found.last(), f"/{length}/control": found.chance()}
            for name, share in {"reached": found.where(True), "unreached": found.where(False)}.items():
                numbers |= {} if math.isnan(share) else {f"/{length}/{name}": share}
        return numbers

    def score(self) -> float:
        """Accuracy after the last layer, in the mean over blocks and lengths."""
        return _mean([found.last() for found in self.maps.values()])

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result and length, and a table of layers and blocks at the greatest length."""
        one = next(iter(results.values()))
        about = (
            "Each prompt tells a digit in one of "
            f"{one.blocks} equal blocks of generated text. A linear classifier names it from the hidden state of the "
            f"last token after a layer: one for each layer and block, of {one.samples} prompts, each named by a "
            "classifier that was fitted without it. Chance: 10 %. Control: the same with shuffled labels. In and "
            "outside the field: over layers and blocks whose key the last token depends on by the pattern, or not."
        )
        rows = [["", "tokens", "after the last layer", "control", "in the field", "outside it", "layers to all blocks"]]
        for label, result in results.items():
            for length, found in result.maps.items():
                shares = (found.last(), found.chance(), found.where(True), found.where(False))
                rows.append([label, f"{length:,}", *map(_cell, shares), _layers_to_cover(found.field)])
        return TaskReport(
            "Receptive field (linear probe)",
            "Receptive field",
            about,
            rows,
            shares=True,
            details={label: result._by_layer() for label, result in results.items()},
            details_heading="by layer and block",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A map for each result at the greatest length, by layer and block."""
        from sparsetrain.evaluation.panels import few

        shown = few(results)
        layers = max(len(result.maps[max(result.maps)].accuracy) for result in shown.values())
        draw = partial(_draw, results=shown, ending=cls.ending(name))
        return Drawing(draw, 1 + 4.5 * len(shown), 2.5 + 0.22 * min(layers, 40))

    def _by_layer(self) -> Rows:
        length = max(self.maps)
        found = self.maps[length]
        rows = [[f"after layer, at {length:,} tokens", *self.block_names(length), "field of the pattern"]]
        for layer, shares in enumerate(found.accuracy):
            field = "-" if found.field is None else _cell(found.field[layer])
            rows.append([str(layer + 1), *map(_cell, shares), field])
        return rows

    def block_names(self, length: int) -> list[str]:
        """The first token of each block."""
        return [f"{block * length // self.blocks:,}" for block in range(self.blocks)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _cell(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def _layers_to_cover(field: list[float] | None) -> str:
    if field is None:
        return "-"
    return next((str(layer) for layer, share in enumerate(field, 1) if share == 1), f"above {len(field)}")


def _draw(figure: Any, results: Mapping[str, ReceptiveFieldResult], ending: str) -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    from sparsetrain.evaluation.panels import FAINT, ORANGE, draw_cells, put_title, short

    all_axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (label, result) in zip(all_axes, results.items(), strict=True):
        length = max(result.maps)
        found = result.maps[length]
        layers = [str(layer) for layer in range(1, len(found.accuracy) + 1)]
        image = draw_cells(axes, np.array(found.accuracy), "{:.0%}", layers, result.block_names(length))
        if found.reached is not None:
            for layer, row in enumerate(found.reached):
                for block, known in enumerate(row):
                    if known < HALF:
                        outline: dict[str, Any] = {"fill": False, "edgecolor": ORANGE, "hatch": "//", "linewidth": 0}
                        axes.add_patch(Rectangle((block, layer), 1, 1, **outline))
        put_title(axes, f"{label}, {short(length)} tokens\n{found.last():.0%} after the last layer")
        axes.set(xlabel="block of the key, by its first token", ylabel="after layer")
    figure.colorbar(image, ax=all_axes, fraction=0.02, pad=0.01, format="{x:.0%}", ticks=[0, 0.5, 1])
    one = next(iter(results.values()))
    control = one.maps[max(one.maps)].chance()
    figure.supxlabel(
        f"digits a linear probe names from the last token{ending}; prompts in a cell: {one.samples}; by chance 10%, "
        f"with shuffled labels {control:.0%};\nhatched: the pattern does not connect block and last token",
        fontsize=9,
        color=FAINT,
    )
