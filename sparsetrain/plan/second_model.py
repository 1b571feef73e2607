"""The models that evaluations hold beside the one that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsetrain.errors import SparsetrainError
from sparsetrain.methods.costs import NO_PARAMETERS
from sparsetrain.plan.shape import ELEMENT, find_shape, known_config
from sparsetrain.plan.trained import count_parameters
from sparsetrain.recipe.schema import ModelSection, Recipe


@dataclass(frozen=True)
class SecondModel:
    """A model that a task of the evaluation loads, whole on each rank, until it is measured."""

    field: str
    """The field of the recipe that names it."""
    name: str
    size: float | None
    """Bytes; None if its shape is not known on this machine."""


def second_models(recipe: Recipe) -> Iterator[SecondModel]:
    """Those of a run's evaluations. One is let go of before the next is loaded."""
    evaluation = recipe.eval
    if not (evaluation.at_start or evaluation.at_end or evaluation.every):
        return
    for task in evaluation.tasks:
        for field in task.other_models:
            name = getattr(task, field)
            if name is not None:
                yield SecondModel(task.path(field), name, _size(name, recipe))


def _size(name: str, recipe: Recipe) -> float | None:
    """Its bytes as it is stored; where its config is not here, each element is taken to have two."""
    folder = Path(name)
    final = folder / "final"
    of_run = (folder / "recipe.yaml").is_file() and final.is_dir()
    section = ModelSection(path=str(final) if of_run else name)
    try:
        shape, config = find_shape(section), known_config(section) or {}
        plain = recipe.model_copy(update={"lora": None, "model": section})
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        return count_parameters(shape, plain, NO_PARAMETERS).total * ELEMENT.get(dtype, 4)
    except SparsetrainError:
        return None
