"""The result of an evaluation, serialisable as JSON."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import TaskResult
from sparsetrain.evaluation.registry import AnyResult


class EvalResult(BaseModel):
    """Everything one evaluation measured; ``model_dump_json`` and ``model_validate_json`` are each other's inverse."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    tasks: dict[str, AnyResult] = {}
    """Results by task name."""

    def metrics(self) -> dict[str, float]:
        """The result as flat numbers for :class:`~sparsetrain.training.output.tracking.Tracker`."""
        return {
            f"eval/{name}{ending}": value
            for name, result in self.tasks.items()
            for ending, value in result.metrics().items()
        }

    def score(self, name: str) -> float:
        """The score of a task (higher is better); NaN if it was not measured."""
        return self.tasks[name].score() if name in self.tasks else float("nan")


def other_inputs(measured: Mapping[str, TaskResult]) -> str:
    """A sentence that names the results whose inputs are not those of the first; empty where there are none."""
    known = {label: result.inputs for label, result in measured.items() if result.inputs}
    first = next(iter(known), "")
    others = ", ".join(label for label, inputs in known.items() if inputs != known[first])
    said = f"Other inputs than those of {first} (prompts, texts or tokens): {others}."
    return f"{said} Compare numbers of equal inputs only." if others else ""


def by_task(results: Mapping[str, EvalResult]) -> list[tuple[str, dict[str, TaskResult]]]:
    """The name of each task and its results by the label of the evaluation, all of one class.

    A run that was resumed may have another task of the same name: that is an entry of its own.
    """
    grouped: dict[tuple[str, str], dict[str, TaskResult]] = {}
    for label, result in results.items():
        for name, measured in result.tasks.items():
            grouped.setdefault((name, measured.task), {})[label] = measured
    return [(name, measured) for (name, _), measured in grouped.items()]
