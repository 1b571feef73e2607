"""What a run folder holds, read for a page: what is damaged or missing becomes a sentence, not an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparsetrain.counted import counted
from sparsetrain.durable import read_bytes
from sparsetrain.errors import CheckpointError, RecipeError, SparsetrainError, first_line
from sparsetrain.evaluation.metrics import METRICS_FILE, Metrics, read_metrics
from sparsetrain.evaluation.report import RESULTS_FILE, read_results
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.survival import SURVIVAL_FILE, Survival
from sparsetrain.recipe import Recipe, load_recipe
from sparsetrain.recipe.local_model import decoder_config
from sparsetrain.recipe.mistaken import is_recipe_instead
from sparsetrain.recipe.rows import OTHERWISE

RECIPE_FILE = "recipe.yaml"
MOST_HEADS = 1024
"""KV heads of a layer; a config that names more is not believed."""
T = TypeVar("T")


class CacheBytes(NamedTuple):
    """Keys and values of one text in generation."""

    own: float
    """Bytes."""
    full: float
    """Bytes with full attention."""
    tokens: float
    """Of the text."""


@dataclass
class RunRecord:
    """The records of a run."""

    folder: Path
    name: str
    """Of its recipe; of the folder, where that cannot be read."""
    recipe: Recipe | None
    metrics: Metrics
    results: dict[str, EvalResult]
    """By the label of the evaluation, in the order of the run."""
    survival: Survival | None
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """Sentences about what is missing or cannot be read."""

    @property
    def layers(self) -> dict[int, float]:
        """The density of each layer; empty if the run did not record it."""
        return {layer: last for layer, (_, last) in sorted(self.metrics.layers.get("attention/density", {}).items())}

    @property
    def cache(self) -> CacheBytes | None:
        """The cache in generation; None if the run did not record it."""
        once = self.metrics.once
        found = CacheBytes(*(once.get(f"cache/{name}", 0.0) for name in ("bytes", "bytes_full", "tokens")))
        return found if min(found) > 0 else None

    @property
    def kv_heads(self) -> int | None:
        """KV heads of the model; None where its config is not on this machine."""
        config = _config_of(self.folder) or (decoder_config(self.recipe.model) if self.recipe else {})
        found = config.get("num_key_value_heads") or config.get("num_attention_heads")
        return found if isinstance(found, int) and 0 < found <= MOST_HEADS else None

    def last_result(self) -> tuple[str, EvalResult] | None:
        """The last evaluation of the model as it is, and its label."""
        found = [(label, result) for label, result in self.results.items() if OTHERWISE not in label]
        return found[-1] if found else None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        CheckpointError: it is not one.
    """
    held = [name for name in (RECIPE_FILE, METRICS_FILE, RESULTS_FILE) if (folder / name).is_file()]
    if not held:
        if (advice := is_recipe_instead(str(folder))) is not None:
            raise CheckpointError(advice)
        problem = f"it has no {RECIPE_FILE}, {METRICS_FILE} or {RESULTS_FILE}" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder} is not a run folder ({problem}); give the output folder of a run")
    notes: list[str] = []

    def reading(name: str, read: Callable[[Path], T], instead: T) -> T:
        try:
            return read(folder / name) if (folder / name).exists() else instead
        except (SparsetrainError, OSError, ValueError, RecursionError) as error:
            reason = first_line(error)
            if isinstance(error, RecipeError) and len(lines := str(error).splitlines()) > 1:
                reason += f" {lines[1].strip()}"
            reason = reason.replace(f"{folder}/", "")
            notes.append(f"{name} cannot be read: {reason}.")
            return instead

    recipe = reading(RECIPE_FILE, lambda file: load_recipe(file).recipe, None)
    record = RunRecord(
        folder,
        (recipe.name if recipe else None) or folder.resolve().name,
        recipe,
        reading(METRICS_FILE, read_metrics, Metrics()),
        reading(RESULTS_FILE, lambda file: read_results(file.parent), {}),
        reading(SURVIVAL_FILE, Survival.load, None),
        reading("environment.json", _mapping, {}),
        notes,
    )
    metrics = record.metrics
    notes += [f"There is no {name}." for name in (RECIPE_FILE, METRICS_FILE) if not (folder / name).exists()]
    if METRICS_FILE in held and not metrics.curves["loss"]:
        notes.append("No steps are recorded.")
    if metrics.unreadable:
        notes.append(f"{counted(metrics.unreadable, 'line')} of {METRICS_FILE} cannot be read.")
    if metrics.nonfinite:
        notes.append(f"The loss of {counted(metrics.nonfinite, 'step')} was not a finite number.")
    if not record.results:
        notes.append("No evaluation is recorded.")
    return record


def _mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    held = json.loads(read_bytes(file))
    if not isinstance(held, dict):
        raise ValueError(f"{file} has unexpected content")
    return held


def _config_of(folder: Path) -> dict[str, Any]:
    """The config of the trained model's decoder; empty for adapters."""
    try:
        config = _mapping(folder / "final/config.json")
    except (OSError, ValueError, RecursionError):
        return {}
    text_config = config.get("text_config")
    return {**config, **text_config} if isinstance(text_config, dict) else config
