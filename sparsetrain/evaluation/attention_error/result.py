"""The result of the task ``attention_error``: numbers, tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from sparsetrain.counted import counted
from sparsetrain.evaluation.base import Drawing, Rows, TaskReport, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LayerError(BaseModel):
    """One layer: means over query heads, rows and windows.

    Errors are norms, over the norm of full attention's output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    layer: int
    mass: float
    """Softmax weight of full attention that the keys hold which a row reads."""
    error: float
    """Error of the layer's output."""
    keys: float
    """Keys that a row reads."""
    top_k_mass: float
    """Mass of as many keys, of the largest weight of each query head."""
    top_k_error: float
    """Error of attention over these."""
    top_p_keys: float
    """The fewest keys of each query head that hold the same mass."""
    window_mass: float
    """Mass of as many keys, the nearest ones."""
    window_error: float
    """Error of attention over these."""


MEASURES = tuple(name for name in LayerError.model_fields if name != "layer")


class AttentionErrorResult(TaskResult):
    """What the keys that layers read hold of full attention, by length and layer."""

    wide = True

    task: Literal["attention_error"] = "attention_error"
    layers: dict[int, list[LayerError]]
    """Layers that have a method, by tokens of a window."""
    before: dict[int, float]
    """Keys that full attention reads for a row, in the mean."""
    rows: int
    """Rows of a window."""
    windows: int
    """Windows of each length."""
    source: str
    """The text."""
    digest: str
    """Equal for equal tokens."""

    def mean(self, length: int, name: str) -> float:
        """A field of :class:`LayerError`, in the mean over layers; NaN without layers."""
        values = [float(getattr(layer, name)) for layer in self.layers[length]]
        return sum(values) / len(values) if values else math.nan

    def worst(self, length: int) -> LayerError | None:
        """The layer with the largest error."""
        return max(self.layers[length], key=lambda layer: layer.error, default=None)

    def metrics(self) -> dict[str, float]:
        """Means over layers at each length, and at the greatest without its name; the largest error of a layer, and
        mass and error of each layer."""
        longest = max(self.layers)
        numbers = {f"/{name}": self.mean(longest, name) for name in MEASURES if self.layers[longest]}
        for length, layers in self.layers.items():
            worst = self.worst(length)
            if worst is None:
                continue
            numbers |= {f"/{length}/{name}": self.mean(length, name) for name in MEASURES}
            numbers[f"/{length}/worst_error"] = worst.error
            for layer in layers:
                numbers[f"/{length}/mass/layer_{layer.layer:02}"] = layer.mass
                numbers[f"/{length}/error/layer_{layer.layer:02}"] = layer.error
        return numbers

    def score(self) -> float:
        """Minus the mean error at the greatest length."""
        return -self.mean(max(self.layers), "error")

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result and length, and a table of its layers at the greatest length."""
        one = next(iter(results.values()))
        about = (
            f"{counted(one.rows, 'row')} in the second half of each of {counted(one.windows, 'window')} of "
            f"{one.source}, compared with full attention on the same queries, keys and values. Mass: softmax weight of "
            "the keys that a row reads. "
            "Error: norm of the output's error over that of full attention's output. Beside it, as many keys: the "
            "largest of each query head (top-k), and the nearest (window). Top-p: the fewest keys of each query head "
            "that hold the same mass. Means over layers that have a method."
        )
        rows = [["", "tokens", *HEADER, "worst error", "in layer"]]
        for label, result in results.items():
            for length in result.layers:
                worst = result.worst(length)
                last = ["-", "-"] if worst is None else [f"{worst.error:.3f}", str(worst.layer)]
                rows.append([label, f"{length:,}", *_cells(partial(result.mean, length), result.before[length]), *last])
        details = {label: result._by_layer() for label, result in results.items()}
        return TaskReport(
            "Attention error", "Attention error", about, rows, details=details, details_heading="by layer"
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing | None:
        """Mass, error and keys by layer at the greatest length; None where no layer has a method."""
        from sparsetrain.evaluation.panels import few
        from sparsetrain.evaluation.text.drawing import draw_side_by_side

        shown = {label: result for label, result in few(results).items() if result.layers[max(result.layers)]}
        if not shown:
            return None
        panels: list[Callable[[Any], None]] = [
            partial(_draw, results=shown, title=f"{title}{cls.ending(name)}", lines=lines)
            for title, lines in PANELS.items()
        ]
        return Drawing(partial(draw_side_by_side, panels=panels), 1.0 + 6.0 * len(panels), 5.0, panels)

    def _by_layer(self) -> Rows:
        length = max(self.layers)
        rows = [[f"layer, at {length:,} tokens", *HEADER]]
        for layer in self.layers[length]:
            rows.append([str(layer.layer), *_cells(partial(getattr, layer), self.before[length])])
        return rows


HEADER = [
    *("mass", "top-k mass", "window mass", "error", "top-k error", "window error"),
    *("keys read", "top-p keys", "keys before"),
]

PANELS = {
    "Softmax weight that is read": {"mass": "method", "top_k_mass": "top-k", "window_mass": "window"},
    "Error of the output": {"error": "method", "top_k_error": "top-k", "window_error": "window"},
    "Keys for this weight": {"keys": "method", "top_p_keys": "top-p"},
}
"""The panels by their titles: fields of a layer, and what they are of."""

STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
"""Lines of a panel."""


def _cells(value: Callable[[str], float], before: float) -> list[str]:
    shares = [f"{value(name):.1%}" for name in ("mass", "top_k_mass", "window_mass")]
    errors = [f"{value(name):.3f}" for name in ("error", "top_k_error", "window_error")]
    return [*shares, *errors, *(f"{value(name):,.0f}" for name in ("keys", "top_p_keys")), f"{before:,.0f}"]


def _draw(axes: Axes, results: Mapping[str, AttentionErrorResult], title: str, lines: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    from sparsetrain.evaluation.panels import FAINT, PAPER, SERIES, put_steps, put_title, short

    handles: list[Line2D] = []
    for (label, result), (color, marker) in zip(results.items(), cycle(SERIES)):
        length = max(result.layers)
        layers = result.layers[length]
        for name, style in zip(lines, STYLES):
            points = [layer.layer for layer in layers], [getattr(layer, name) for layer in layers]
            axes.plot(*points, color=color, linestyle=style, marker=marker if style == "-" else None, linewidth=2)
        handles.append(Line2D([], [], color=color, marker=marker, label=f"{label}, {short(length)} tokens"))
    handles += [Line2D([], [], color=FAINT, linestyle=style, label=lines[name]) for name, style in zip(lines, STYLES)]
    put_title(axes, title)
    put_steps(axes)
    if "keys" in lines:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="layer", ylabel={"mass": "share", "error": "relative error", "keys": "keys"}[next(iter(lines))])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    place: Any = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.16)}
    axes.legend(handles=handles, **place, ncols=2, frameon=False, fontsize=8)
