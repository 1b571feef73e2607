"""The evaluations of a run by label, and their report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.activity import activity
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.base import Task
from sparsetrain.evaluation.fingerprint import describe, weights_digest
from sparsetrain.evaluation.html.page import PAGE_FILE, write_page
from sparsetrain.evaluation.journal import Journal
from sparsetrain.evaluation.report import read_results, write_report
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.row_model import as_row
from sparsetrain.evaluation.runner import evaluate, make_inputs, told_work
from sparsetrain.methods.full import FullConfig
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.moments import evaluations_of
from sparsetrain.recipe.rows import OTHERWISE
from sparsetrain.time_left import PAUSE, clock_time
from sparsetrain.training.changes import describe_change
from sparsetrain.training.job import Job, Loaded

SAMPLES_FOLDER = "evaluation.samples"
"""Finished samples of an evaluation that is not, and of those before training until the run has ended: a run that is
stopped goes on with them, without a checkpoint too."""


@dataclass
class Evaluations:
    """Runs the evaluations of the ``eval`` section, and keeps the results of the whole run in its folder.

    Args:
        results: The results of this run so far, by label.
        history: The changes made when the run was resumed, for the report.
        between: Called on every rank after each batch of an evaluation.
    """

    job: Job
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    results: dict[str, EvalResult]
    history: Sequence[dict[str, Any]] = ()
    between: Callable[[], None] = lambda: None

    def measure(
        self, label: str, inputs: Mapping[str, Task] | None = None, *, keep_samples: bool = False
    ) -> EvalResult | None:
        """Evaluate the current model and keep the result under ``label``; None if the section is empty.

        Args:
            inputs: of :func:`make_inputs`, where they are there already.
            keep_samples: until :meth:`forget_samples`.

        Raises:
            Stopped: The run was asked to stop after training has begun.
        """
        job, section = self.job, self.job.recipe.eval
        if section.empty:
            return None
        activity.at(f"evaluating: {label}", activity.step)
        about = describe(self.model, self.tokenizer, weights_digest(self.model, job.world))
        journal = Journal.open(job.output / SAMPLES_FOLDER, label, about, job.world, say=job.say)
        for note in journal.notes:
            job.say(f"{label}: {note}")
        with job.progress.counting(f"evaluating: {label}") as on_progress:

            def moved(done: int, total: int) -> None:
                activity.moved()
                on_progress(done, total)
                self.between()
                job.signals.pause(job.world.largest)

            result = evaluate(
                self.model,
                self.tokenizer,
                section,
                job.world,
                seed=job.recipe.train.seed,
                inputs=inputs,
                on_progress=moved,
                journal=journal,
                first=next(iter(self.results.values()), None),
            )
        # A finished run that takes more steps measures this label again: the last result is the last one there.
        self.results.pop(label, None)
        self.results[label] = result
        if job.world.main:
            self.write_report(f"Evaluation of {job.recipe.name}")
        if not keep_samples:
            journal.remove(job.world)
        return result

    def forget_samples(self) -> None:
        """Remove what is kept of finished evaluations, at the end of the run, on rank 0."""
        shutil.rmtree(self.job.output / SAMPLES_FOLDER, ignore_errors=True)

    def measure_rows(self, label: str) -> None:
        """Evaluate the model in the other ways of ``eval.rows``.

        Args:
            label: of the model as it is.

        Raises:
            Stopped: The run was asked to stop.
        """
        for asked in self.job.recipe.eval.rows:
            row = asked.read()
            with as_row(self.model, row):
                self.measure(f"{label}{OTHERWISE}{row.label}")

    def write_report(self, title: str, pictures: Sequence[Path] = ()) -> None:
        """Write ``evaluation.json`` and ``report.md`` with the results so far."""
        history = [describe_change(line) for line in self.history]
        self.job.record(
            "the report",
            lambda: write_report(self.results, self.job.output, title=title, pictures=pictures, history=history),
        )

    def write_page(self) -> None:
        """Write ``report.html`` from the records in the run folder."""
        history = [describe_change(line) for line in self.history]
        self.job.record(PAGE_FILE, lambda: write_page(self.job.output, history=history))


def results_before_training(job: Job, loaded: Loaded, *, resumed: bool) -> dict[str, EvalResult]:
    """The results before training, measured now or by the run that is resumed.

    Raises:
        RecipeError, DataError: A later evaluation is not possible.
    """
    section = job.recipe.eval
    before = section.measures_at_start and not resumed
    if not section.empty and (before or section.at_end or section.every is not None):
        inputs = make_inputs(section, loaded.tokenizer, job.recipe.train.seed)
        _announce(job, loaded, inputs, before=before)
        if before:
            return evaluate_untrained(job, loaded, inputs)
    return recorded_results(job) if resumed else {}


def _announce(job: Job, loaded: Loaded, inputs: Mapping[str, Task], *, before: bool) -> None:
    """Say how many evaluations there are, and how much each of them is: those of a base come along unseen."""
    if told := evaluations_of(job.recipe, loaded.plan.steps, at_start=before):
        job.say(f"evaluations: {told}; each of {told_work(inputs, job.world.size)}")


def evaluate_untrained(job: Job, loaded: Loaded, inputs: Mapping[str, Task]) -> dict[str, EvalResult]:
    """Evaluate the original dense model, and then the model with the method before training."""
    attention = job.recipe.attention
    evaluations = Evaluations(job, loaded.model, loaded.tokenizer, {})
    if attention.method != "full":
        start = time.monotonic()
        sparsify(loaded.model, FullConfig())
        evaluations.measure("full attention, before", inputs, keep_samples=True)
        seconds = time.monotonic() - start
        if seconds > PAUSE:
            ways = "eval.at_start=false and eval.at_end=false leave them out"
            job.say(f"this evaluation took {clock_time(seconds)}; expect as much of the others ({ways})")
        sparsify(loaded.model, attention)
    evaluations.measure(f"{attention.method}, before", inputs, keep_samples=True)
    return evaluations.results


def recorded_results(job: Job) -> dict[str, EvalResult]:
    """The results of the run that is resumed; an unreadable file only causes a warning."""
    try:
        return read_results(job.output)
    except (CheckpointError, OSError) as error:
        job.say(f"warning: {error}; the report continues without earlier results")
        return {}
