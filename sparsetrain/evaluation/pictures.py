"""Pictures of a run as PNG files. Each is a separate file and a panel of ``report.png``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.durable import write_whole
from sparsetrain.evaluation.attention_panels import draw_attention
from sparsetrain.evaluation.base import Drawing, LossMarks, TaskResult
from sparsetrain.evaluation.curve_panels import draw_loss
from sparsetrain.evaluation.metrics import read_metrics
from sparsetrain.evaluation.panels import INK
from sparsetrain.evaluation.registry import TASKS
from sparsetrain.evaluation.result import EvalResult, by_task
from sparsetrain.evaluation.survival import Survival, draw_survival

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsetrain.methods.base import MethodConfig

ROW = 4.6
"""Inches of a row of ``report.png``."""
HIGHEST = 14.0
"""Inches of the selection there, however many layers and heads there are; ``selection.png`` has all their lines."""


def loss_curve(metrics: Path, out: Path, results: Mapping[str, EvalResult] | None = None) -> Path:
    """Draw training loss, learning rate and evaluation results over steps, from ``metrics.jsonl``."""
    figure = _figure(8, 4.5)
    found = read_metrics(metrics)
    draw_loss(figure.subplots(), found, loss_marks(results or {}, found.evaluations))
    return _save(figure, out)


def drawings(results: Mapping[str, EvalResult], trained_length: int | None = None, *, wide: bool) -> dict[str, Drawing]:
    """The drawings of the tasks, by task name.

    Args:
        trained_length: tokens of a training row.
        wide: those with several axes side by side, or those with one.
    """
    found = {}
    for name, measured in by_task(results):
        result = type(next(iter(measured.values())))
        drawing = result.drawing(name, measured, trained_length) if result.wide is wide else None
        if drawing is not None:
            found[name] = drawing
    return found


def task_picture(drawing: Drawing, out: Path, *, wide: bool) -> Path:
    """One of :func:`drawings` as a file of its own."""
    figure = _figure(drawing.width, drawing.height)
    drawing.draw(figure if wide else figure.subplots())
    return _save(figure, out)


def attention_picture(
    attention: MethodConfig, out: Path, *, length: int, num_layers: int, num_kv_heads: int = 1
) -> Path:
    """The block pattern at ``length`` tokens, beside the blocks that reach the last one after each layer."""
    figure = _figure(12, 5)
    draw_attention(figure, attention, length, num_layers, num_kv_heads)
    return _save(figure, out)


def selection_picture(survival: Survival, out: Path) -> Path:
    """Draw how long the tokens of a row are read, by layer and head."""
    figure = _figure(12, survival.height)
    draw_survival(figure, survival)
    return _save(figure, out)


def report_picture(
    out: Path,
    *,
    title: str,
    metrics: Path,
    results: Mapping[str, EvalResult],
    attention: MethodConfig,
    length: int,
    num_layers: int,
    num_kv_heads: int = 1,
    survival: Survival | None = None,
) -> Path:
    """Loss, what the tasks draw, attention, and what a learned selection keeps, on one page."""
    panels, wide = (list(drawings(results, length, wide=kind).values()) for kind in (False, True))
    # One panel stands beside the loss, the others two by two below it.
    pairs = [panels[start : start + 2] for start in range(1, len(panels), 2)]
    selected = [] if survival is None else [min(survival.height, HIGHEST) / ROW]
    heights = [1.0, *(0.85 for _ in pairs + wide), 1.15, *selected]
    figure = _figure(14, ROW * sum(heights))
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.03)
    if panels:
        left, right = parts[0].subplots(1, 2, width_ratios=[3, 2])
        panels[0].draw(right)
    else:
        left = parts[0].subplots()
    found = read_metrics(metrics)
    draw_loss(left, found, loss_marks(results, found.evaluations))
    for part, pair in zip(parts[1:], pairs):
        for axes, drawing in zip(part.subplots(1, len(pair), squeeze=False)[0], pair, strict=True):
            drawing.draw(axes)
    for part, drawing in zip(parts[1 + len(pairs) :], wide):
        drawing.draw(part)
    draw_attention(parts[1 + len(pairs) + len(wide)], attention, length, num_layers, num_kv_heads)
    if survival is not None:
        draw_survival(parts[-1], survival)
    return _save(figure, out)


def loss_marks(results: Mapping[str, EvalResult], lines: list[dict[str, Any]]) -> list[LossMarks]:
    """What evaluations measured of a loss: of the tasks of ``results``, and of those that have their default names.

    Args:
        lines: the lines of ``metrics.jsonl`` that evaluations wrote.
    """
    classes: dict[str, type[TaskResult]] = {
        section.model_fields["task"].default: section.result for section in TASKS.usable()
    }
    classes |= {name: type(next(iter(measured.values()))) for name, measured in by_task(results)}
    found = (result.loss_marks(name, lines) for name, result in classes.items())
    return [marks for marks in found if marks is not None and marks.points]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, out: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, facecolor="white")
    write_whole(out, drawn.getvalue())
    return out
