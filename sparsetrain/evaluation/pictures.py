"""Pictures of a run as PNG files. Each is a file of its own and a panel of ``report.png``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.durable import write_whole
from sparsetrain.evaluation.panels import (
    INK,
    MAX_RESULTS,
    draw_attention,
    draw_heatmaps,
    draw_loss,
    draw_perplexity,
    with_passkey,
)
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.survival import draw_survival

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from sparsetrain.methods.base import MethodConfig


def loss_curve(metrics: Path, out: Path) -> Path:
    """Training loss, learning rate and evaluation perplexity over steps, from ``metrics.jsonl``."""
    figure = _figure(8, 4.5)
    draw_loss(figure.subplots(), _read_metrics(metrics))
    return _save(figure, out)


def perplexity_by_length(results: Mapping[str, EvalResult], out: Path, *, trained_length: int | None = None) -> Path:
    """Perplexity against context length, a line for each labelled result.

    Args:
        trained_length: drawn as a vertical line.
    """
    figure = _figure(7, 4.5)
    draw_perplexity(figure.subplots(), results, trained_length)
    return _save(figure, out)


def passkey_heatmaps(results: Mapping[str, EvalResult], out: Path) -> Path:
    """Passkey accuracy by length and depth, a heat map for each labelled result that measured it."""
    figure = _figure(1 + 4 * max(1, min(MAX_RESULTS, len(with_passkey(results)))), 3.8)
    draw_heatmaps(figure, results)
    return _save(figure, out)


def attention_picture(
    attention: MethodConfig, out: Path, *, length: int, num_layers: int, num_kv_heads: int = 1
) -> Path:
    """The block pattern at ``length`` tokens, beside the blocks that reach the last one after each layer."""
    figure = _figure(12, 5)
    draw_attention(figure, attention, length, num_layers, num_kv_heads)
    return _save(figure, out)


def selection_picture(lifetimes: Mapping[int, torch.Tensor], out: Path) -> Path:
    """How long the tokens of a row survive, by layer and head; ``lifetimes`` as in :meth:`Method.lifetimes`."""
    figure = _figure(12, 2.2 + 0.14 * sum(len(heads) for heads in lifetimes.values()))
    draw_survival(figure, lifetimes)
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
) -> Path:
    """Loss, perplexity, passkey and attention on one page."""
    heights = [1.0, 0.85, 1.15] if with_passkey(results) else [1.0, 1.15]
    figure = _figure(14, 4.6 * sum(heights))
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.03)
    if any(result.perplexity for result in results.values()):
        left, right = parts[0].subplots(1, 2, width_ratios=[3, 2])
        draw_perplexity(right, results, length)
    else:
        left = parts[0].subplots()
    draw_loss(left, _read_metrics(metrics))
    if len(parts) == 3:
        draw_heatmaps(parts[1], results)
    draw_attention(parts[-1], attention, length, num_layers, num_kv_heads)
    return _save(figure, out)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, out: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, facecolor="white")
    write_whole(out, drawn.getvalue())
    return out
