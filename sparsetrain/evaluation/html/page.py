"""``report.html``: one run as a page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparsetrain.counted import counted
from sparsetrain.errors import SparsetrainError
from sparsetrain.evaluation.attention_panels import draw_mask, draw_reach
from sparsetrain.evaluation.base import LossMarks
from sparsetrain.evaluation.curve_panels import draw_curves, draw_layers, draw_loss
from sparsetrain.evaluation.html.blocks import Page, Section, Table, refuse_over, significant, size
from sparsetrain.evaluation.html.record import RunRecord, read_run
from sparsetrain.evaluation.html.svg import picture
from sparsetrain.evaluation.html.tasks import task_sections
from sparsetrain.evaluation.metrics import Points
from sparsetrain.evaluation.pictures import loss_marks
from sparsetrain.evaluation.survival import draw_survival
from sparsetrain.recipe import dump_recipe
from sparsetrain.recipe.describe import attention_facts
from sparsetrain.recipe.differences import differences, shipped_origin

PAGE_FILE = "report.html"
ROWS = 12
"""Steps in the table of a curve."""


def write_page(folder: Path, *, out: Path | None = None, history: Sequence[str] = ()) -> Path:
    """Write the page of a run folder from its records; return its path.

    Args:
        out: the file; by default ``report.html`` in the folder.
        history: lines about what was changed when the run was resumed.

    Raises:
        CheckpointError: the folder is not a run's, or the file is there and is no page of ours.
        OSError: the file cannot be written.
    """
    record, file = read_run(folder), out or folder / PAGE_FILE
    refuse_over(file)  # before anything is drawn
    return run_page(record, history).write(file)


def run_page(record: RunRecord, history: Sequence[str] = ()) -> Page:
    """The page of a run."""
    recipe = record.recipe
    sections = [_training(record)] if record.metrics.curves["loss"] else []
    sections += task_sections(record.results, recipe.sequence.length if recipe else None)
    if recipe is not None:
        sections.append(_attention(record))
    sections += _telemetry(record)
    sections += _cache(record)
    if recipe is not None:
        sections.append(_recipe(record, history))
    lead = f"{attention_facts(recipe)}." if recipe else ""
    return Page(record.name, lead, facts(record), sections, record.notes)


def facts(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, value and remark of the numbers at the top of the page."""
    metrics, recipe = record.metrics, record.recipe
    found: list[tuple[str, str, str]] = []
    if recipe is not None:
        model = recipe.model.path or f"random weights ({(recipe.model.architecture or {}).get('model_type')})"
        parameters = metrics.once.get("model/parameters")
        found.append(("Method", recipe.attention.method, ""))
        found.append(("Model", model, f"{parameters / 1e6:,.1f}M parameters" if parameters else ""))
        found.append(("Trained at", f"{recipe.sequence.length:,} tokens", ""))
    if losses := metrics.curves["loss"]:
        planned = recipe.train.steps if recipe else None
        found.append(("Steps", f"{losses[-1][0]:,}", f"of {planned:,}" if planned else ""))
        if (tokens := metrics.last("tokens")) is not None:
            found.append(("Tokens", f"{tokens:,.0f}", "trained on"))
        found.append(("Last loss", f"{losses[-1][1]:.3f}", "nats per token"))
    if (speed := metrics.median("tokens_per_second")) is not None:
        found.append(("Throughput", f"{speed:,.0f} tokens/s", "median of the logged steps"))
    if (memory := metrics.largest("peak_memory_gb")) is not None:
        found.append(("Peak memory", size(memory * 1e9), "of rank 0"))
    if (cache := record.cache) is not None:
        found.append(("Cache", size(cache.own), f"at {cache.tokens:,.0f} tokens"))
    return found


def _training(record: RunRecord) -> Section:
    metrics = record.metrics
    losses, speeds = metrics.curves["loss"], metrics.curves["tokens_per_second"]
    section = Section("Training")
    first, last = losses[0], losses[-1]
    title = f"Training loss: {first[1]:.3f} at step {first[0]:,}, {last[1]:.3f} at step {last[0]:,}"
    marks = _marks(record)
    section.draw(lambda: picture(lambda axes: draw_loss(axes, metrics, marks), title))
    if speeds:
        name = "Throughput"
        section.draw(
            lambda: picture(
                lambda axes: draw_curves(axes, name, "tokens per second", {name: speeds}),
                f"{name} by step: median {metrics.median('tokens_per_second'):,.0f} tokens per second",
            )
        )
    rows = [["step", "loss", "tokens/s"]]
    of_step = dict(speeds)
    for step, loss in spread(losses):
        speed = of_step.get(step)
        rows.append([f"{step:,}", f"{loss:.4f}", "-" if speed is None else f"{speed:,.0f}"])
    section.tables.append(Table("Loss and throughput by step", rows, folded=True))
    return section


def _marks(record: RunRecord) -> list[LossMarks]:
    try:
        return loss_marks(record.results, record.metrics.evaluations)
    except (ValueError, TypeError, KeyError, OverflowError):  # lines that no evaluation wrote
        return []


def spread(points: Points) -> Points:
    """A few points of a curve, evenly spread, the first and the last among them."""
    count = min(ROWS, len(points))
    return [points[round(index * (len(points) - 1) / max(count - 1, 1))] for index in range(count)]


def _attention(record: RunRecord) -> Section:
    recipe = record.recipe
    assert recipe is not None
    attention, length = recipe.attention, recipe.sequence.length
    section = Section("Attention")
    densities = record.layers
    kv_heads = record.kv_heads
    pattern = attention.pattern_drawn(length, kv_heads or 2)
    if pattern is None:
        section.about.append(f"{attention.method} learns its selection: there is no fixed pattern to draw.")
    elif pattern.per_head and kv_heads is None:
        section.about.append(
            "The pattern differs by KV head, and the model's config is not here to say how many: none is drawn."
        )
    else:
        kind = attention.pattern_drawn(length, kv_heads or 1) or pattern
        title = f"Blocks that see each other: {kind.mean_density(length):.1%} of full attention at {length:,} tokens"
        section.draw(lambda: picture(lambda axes: draw_mask(axes, attention, kind, length), title, height=5.0))
        if layers := len(densities):
            with section.saying("The reach of the pattern cannot be drawn"):
                words, dense = "Blocks that reach the last one after each layer", attention.resolve_dense_layers(layers)
                reach = partial(draw_reach, pattern=kind, length=length, num_layers=layers, dense_layers=dense)
                section.draw(lambda: picture(reach, words, height=5.0))
    if densities:
        title = "Density: share of the causal pairs attended"
        section.draw(lambda: picture(lambda axes: draw_layers(axes, title, "share", {"density": densities}), title))
        section.tables.append(_by_layer("Density by layer", {"density": densities}))
    return section


def _telemetry(record: RunRecord) -> list[Section]:
    """What the method observed of its layers; nothing for methods without telemetry."""
    section = Section("Telemetry by layer")
    groups = {name: found for name, found in sorted(record.metrics.layers.items()) if name != "attention/density"}
    masses = {name: found for name, found in groups.items() if name.endswith("mass")}
    for name, found in masses.items():
        curves = {
            label: {layer: pair[place] for layer, pair in found.items()}
            for place, label in enumerate(("first logged step", "last logged step"))
        }
        title = f"{name}: share of the softmax weight that the keys read hold"
        section.draw(
            lambda title=title, curves=curves: picture(  # type: ignore[misc]
                lambda axes: draw_layers(axes, title, "share of the weight", curves), title
            )
        )
    survival = record.survival
    if survival is not None:
        title = "How long each token of a row is read after it has left the window, by layer and head"
        height = min(survival.height, 9.0)
        section.draw(lambda: picture(lambda figure: draw_survival(figure, survival), title, height=height, whole=True))
    if groups:
        values: dict[str, dict[int, float]] = {}
        for name, found in groups.items():
            short = name.rpartition("/")[2]
            values[name if short in values else short] = {layer: last for layer, (_, last) in found.items()}
        section.tables.append(_by_layer("Telemetry in the last logged step", values, folded=True))
    return [section] if section.pictures or section.tables else []


def _by_layer(caption: str, values: dict[str, dict[int, float]], *, folded: bool = True) -> Table:
    layers = sorted({layer for found in values.values() for layer in found})
    rows = [["layer", *values]]
    for layer in layers:
        cells = (found.get(layer) for found in values.values())
        rows.append([str(layer), *("-" if value is None else significant(value) for value in cells)])
    return Table(caption, rows, folded)


def _cache(record: RunRecord) -> list[Section]:
    if record.cache is None:
        return []
    own, full, tokens = record.cache
    method = record.recipe.attention.method if record.recipe else "this method"
    about = (
        f"Keys and values of one text of {tokens:,.0f} tokens, behind a prompt as long as a training row, in a "
        "SparseCache in the model's dtype."
    )
    rows = [
        ["", "bytes", "share", "bytes a token"],
        ["full attention", size(full), "100%", size(full / tokens)],
        [method, size(own), f"{own / full:.1%}", size(own / tokens)],
    ]
    return [Section("Cache in generation", [about], tables=[Table("Bytes of the cache", rows)])]


def _recipe(record: RunRecord, history: Sequence[str]) -> Section:
    recipe = record.recipe
    assert recipe is not None
    section = Section("Recipe")
    try:
        origin = shipped_origin(recipe)
    except SparsetrainError:
        origin = None
    if origin is not None:
        name, shipped = origin
        found = differences([shipped, recipe])
        which = "of the same name" if name == recipe.name else "that it is nearest to"
        if found:
            section.about.append(
                f"It differs from {name}, the shipped recipe {which}, in {counted(len(found), 'setting')}."
            )
            rows = [["setting", name, "this run"], *([key, *map(plain, values)] for key, values in found.items())]
            section.tables.append(Table(f"Differences from {name}", rows, words=True))
        else:
            section.about.append(f"It is {name}, the shipped recipe, without changes.")
    if history:
        rows = [["changed when the run was resumed"], *([line] for line in history)]
        section.tables.append(Table("Changed during the run", rows, words=True))
    if record.environment:
        section.about.append(_versions(record.environment))
    section.code = ("The whole recipe", dump_recipe(recipe))
    return section


def _versions(environment: dict[str, Any]) -> str:
    packages = environment.get("packages")
    named = packages.items() if isinstance(packages, dict) else ()
    return (
        f"Python {environment.get('python')}, {', '.join(f'{name} {version}' for name, version in named if version)}."
    )


def plain(value: Any) -> str:
    """A value of a recipe in one line."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(each)}" for name, each in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
