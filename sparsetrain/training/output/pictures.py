"""Draw the pictures at the end of a run, independently: a failure of one does not affect the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparsetrain.evaluation.metrics import METRICS_FILE
from sparsetrain.evaluation.pictures import (
    attention_picture,
    drawings,
    loss_curve,
    report_picture,
    selection_picture,
    task_picture,
)
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.survival import SURVIVAL_FILE, Survival
from sparsetrain.modeling import sparse_layers
from sparsetrain.recipe import Recipe


def draw_run(
    model: PreTrainedModel,
    recipe: Recipe,
    folder: Path,
    results: Mapping[str, EvalResult],
    title: str,
    attempt: Callable[[str, Callable[[], Any]], bool],
) -> Iterator[Path]:
    """Draw loss, attention, tasks, selection, and all of them as ``report.png``, into the run folder.

    Args:
        attempt: Called with a picture's description and the function that draws it; returns whether it succeeded.

    Yields:
        The PNG files, each as soon as it is drawn.
    """
    metrics, attention = folder / METRICS_FILE, recipe.attention
    methods = [method for _, _, method in sparse_layers(model) if method is not None]
    lifetimes = {layer: rows for method in methods for layer, rows in method.lifetimes().items()}
    survival = Survival.of(lifetimes) if lifetimes else None
    text_config = model.config.get_text_config()
    shape = {
        "length": recipe.sequence.length,
        "num_layers": text_config.num_hidden_layers,
        "num_kv_heads": getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads,
    }
    pictures: dict[str, Callable[[Path], Any]] = {
        "loss": lambda out: loss_curve(metrics, out, results),
        "attention": lambda out: attention_picture(attention, out, **shape),
        "report": lambda out: report_picture(
            out, title=title, metrics=metrics, results=results, attention=attention, survival=survival, **shape
        ),
    }
    for name, drawing in drawings(results, recipe.sequence.length, wide=True).items():
        pictures[name] = partial(task_picture, drawing, wide=True)
    if survival is not None:
        attempt(SURVIVAL_FILE, lambda: survival.save(folder / SURVIVAL_FILE))
        pictures["selection"] = lambda out: selection_picture(survival, out)
    for name, draw in pictures.items():
        out = folder / f"{name}.png"

        def drawn(draw: Callable[[Path], Any] = draw, out: Path = out) -> None:
            draw(out)

        if attempt(f"the picture {out.name}", drawn):
            yield out
