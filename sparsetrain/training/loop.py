"""The training loop: steps, and between them metrics, evaluations and checkpoints. Start at :meth:`Loop.run`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsetrain.activity import activity
from sparsetrain.data import Step, StepLoader
from sparsetrain.errors import TrainingError
from sparsetrain.recipe.batch import BatchPlan
from sparsetrain.training.checkpoints import TrainState
from sparsetrain.training.job import Job
from sparsetrain.training.output.attempt import attempt
from sparsetrain.training.schedule import peak_lr
from sparsetrain.training.selfcheck.forward import GradientWatch
from sparsetrain.training.step import Stepper, StepResult
from sparsetrain.training.supervision.signals import Outcome, Stopped


class Callbacks:
    """Hooks between steps, overridden by runs and benchmarks; here they do nothing.

    Every rank calls them in the same order.
    """

    def before_step(self, step: int) -> None:
        """Called before ``step`` (1 is the first)."""

    def on_step(self, step: int, result: StepResult) -> None:
        """Called after ``step`` (1 is the first)."""

    def evaluate(self) -> bool:
        """Evaluate the model; returns whether to keep the checkpoint of this step as the best.

        Raises:
            Stopped: The run was asked to stop.
        """
        return False

    def stops_early(self) -> bool:
        """Whether the evaluations so far end the training; asked on every rank, before the first step and after each
        evaluation."""
        return False

    def is_evaluated(self, step: int) -> bool:
        """Whether a step has been evaluated, in this process or before it was resumed."""
        return True

    def save(self, wait: bool) -> None:
        """Begin a checkpoint, unless that of this step has begun, and keep it as the best if the evaluation says so;
        ``wait`` until it is complete."""

    def poll_checkpoint(self) -> None:
        """Complete a pending checkpoint if its files have been written."""

    def keep_as_best(self) -> None:
        """Keep the last checkpoint as the best."""


@dataclass
class Loop:
    """Runs the optimizer steps of a run.

    Args:
        engine: The DeepSpeed engine around :class:`~sparsetrain.training.loss.CausalLMLoss`.
        state: Counts the steps, including those before the run was resumed.
    """

    job: Job
    plan: BatchPlan
    engine: Any
    loader: StepLoader
    state: TrainState
    callbacks: Callbacks

    def __post_init__(self) -> None:
        self.stepper = Stepper(self.job, self.plan, self.engine, self.state)

    def run(self) -> Outcome:
        """Train to the end of the plan, or until a signal stops the run early (after saving a checkpoint).

        Raises:
            TrainingError: A loss or gradient was not finite and the recipe says stop; or a trainable parameter got no
                gradient in the first step.
        """
        watch = GradientWatch(self.engine.module) if self.state.step == 0 else None
        activity.timed = True
        if (stop := self._evaluate_belatedly()) is not None:
            return stop
        if self.state.step > 0 and self.callbacks.stops_early():
            return Outcome.FINISHED
        while self.state.step < self.plan.steps:
            stop = self._take_step(watch)
            watch = None
            if (outcome := self._evaluate_and_save(stop)) is not None:
                return outcome
        return Outcome.FINISHED

    def _evaluate_belatedly(self) -> Outcome | None:
        """Run the evaluation that was skipped when the run was stopped; returns how the run ends if it is stopped
        again, else None."""
        step = self.state.step
        owed = (
            0 < step < self.plan.steps
            and _due(self.job.recipe.eval.every, step)
            and not self.callbacks.is_evaluated(step)
        )
        try:
            if owed and self.callbacks.evaluate():
                self.callbacks.keep_as_best()
        except Stopped as stopped:
            return stopped.outcome
        return None

    def _take_step(self, watch: GradientWatch | None) -> Outcome | None:
        """Take the next step and count it; returns how the run ends if any rank was asked to stop, else None."""
        self.callbacks.before_step(self.state.step + 1)
        activity.at("waiting for data", self.state.step + 1)
        batch = next(self.loader)
        result, stop = self.stepper.take(batch, watch)
        if not (result.applied and math.isfinite(result.loss)):
            self._nonfinite(batch, result)
        self.state.step += 1
        self.state.tokens += result.tokens
        self.state.data = batch.state
        self.callbacks.on_step(self.state.step, result)
        self.callbacks.poll_checkpoint()
        return stop

    def _evaluate_and_save(self, stop: Outcome | None) -> Outcome | None:
        """Evaluate and save what is due after a step.

        Args:
            stop: How the run ends if a rank was asked to stop, else None.

        Returns:
            How the run ends if this step is its last, else None.
        """
        finished = self.state.step == self.plan.steps
        best, due = False, _due(self.job.recipe.checkpoint.every, self.state.step)
        if not finished and stop is None and _due(self.job.recipe.eval.every, self.state.step):
            if due:
                self.callbacks.save(False)  # what is killed in the evaluation loses no step
                due = False
            try:
                best = self.callbacks.evaluate()
                finished = self.callbacks.stops_early()
            except Stopped as stopped:
                stop = stopped.outcome
        ends = finished or stop is not None
        if ends or best or due:
            self.callbacks.save(ends)
        return Outcome.FINISHED if finished else stop

    def _nonfinite(self, batch: Step, result: StepResult) -> None:
        """Record the batch in ``nonfinite.jsonl``, then stop or continue as the recipe says.

        Under fp16 it is normal that the loss scaler skips a step, as long as the loss itself is finite.
        """
        if self.job.recipe.model.dtype == "float16" and math.isfinite(result.loss):
            return
        origins: list[Any] = [None] * self.job.world.size
        dist.all_gather_object(origins, [micro.origin for micro in batch.micro_batches])
        record = {"step": self.state.step + 1, "loss": str(result.loss), "documents_by_rank": origins}
        path = self.job.output / "nonfinite.jsonl"
        if self.job.world.main:
            attempt(f"{path} cannot be written", lambda: _append(path, record), self.job.say, f"it would hold {record}")
        if self.job.recipe.train.on_nonfinite == "stop":
            name, rate = peak_lr(self.job.recipe.train)
            raise TrainingError(
                f"step {self.state.step + 1}: loss {result.loss} with a gradient norm of {result.grad_norm}; the "
                f"weights were not updated, and {path} lists the documents of the batch. Lower "
                f"train.{name} ({rate}), look at those documents, or set train.on_nonfinite: skip; then "
                "--resume continues from the last checkpoint"
            )


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
