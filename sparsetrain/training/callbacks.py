"""The callbacks of a run between steps: progress, metrics, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import dataclass

import torch

from sparsetrain.activity import activity
from sparsetrain.counted import counted
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.recipe import BatchPlan, dump_recipe
from sparsetrain.recipe.schema import EarlyStopping
from sparsetrain.training.checkpoints import Saver, TrainState
from sparsetrain.training.job import Job
from sparsetrain.training.loop import Callbacks
from sparsetrain.training.output import run_folder
from sparsetrain.training.output.costs import Costs
from sparsetrain.training.output.evaluations import Evaluations
from sparsetrain.training.output.profile import StepProfiler
from sparsetrain.training.output.system import SystemUse
from sparsetrain.training.output.tracking import Tracker
from sparsetrain.training.step import StepResult, is_logged


@dataclass
class RunCallbacks(Callbacks):
    """The callbacks of a run."""

    job: Job
    plan: BatchPlan
    state: TrainState
    costs: Costs
    saver: Saver
    tracker: Tracker
    evaluations: Evaluations

    def __post_init__(self) -> None:
        section = self.job.recipe.train.profile
        profiled = section is not None and self.job.world.main
        self.profiler = StepProfiler(section, self.job.output, self.job.say) if section and profiled else None
        self.system = SystemUse(self.job.world.device, self.job.say) if self.job.world.main else None
        # The checkpoint that began before an evaluation is complete as soon as it is written, not behind it.
        self.evaluations.between = self.poll_checkpoint

    def before_step(self, step: int) -> None:
        """See :meth:`Callbacks.before_step`."""
        if self.profiler is not None:
            self.profiler.begin(step)

    def on_step(self, step: int, result: StepResult) -> None:
        """Show a step and record its metrics if it is logged."""
        recipe = self.job.recipe
        if self.profiler is not None:
            self.profiler.end(step)
        if not is_logged(recipe, self.plan, step):
            return
        self.job.progress.update(step, result.loss, result.lr, result.grad_norm)
        speed = result.tokens / result.seconds
        metrics = {
            "loss": result.loss,
            # The loss of a pair of answers is none of tokens.
            **({} if recipe.preference else {"perplexity": math.exp(min(result.loss - result.balance_loss, 100.0))}),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": self.state.tokens,
            "tokens_per_second": speed,
            "row_fill": result.tokens / self.plan.tokens_per_step,
            "step_seconds": result.seconds,
            "peak_memory_gb": _peak_memory(self.job.world.device) / 1e9,
            "skipped": float(not result.applied),
            **result.observations,
        }
        if recipe.attention.new_modules:
            metrics["lr_new_modules"] = result.lr_new_modules
        metrics |= self.costs.utilisation(speed)
        if self.system is not None:
            metrics |= self.system.metrics()
        self.tracker.log(metrics, step)

    def evaluate(self) -> bool:
        """See :meth:`Callbacks.evaluate`."""
        result = self.evaluations.measure(self._label(self.state.step))
        if result is not None:
            self.tracker.log(result.metrics(), self.state.step)
        self.job.progress.restart_clock()
        return result is not None and self._is_best(result)

    def stops_early(self) -> bool:
        """See :meth:`Callbacks.stops_early`. It follows from the results so far, so a resumed run goes on counting."""
        rule = self.job.recipe.eval.early_stopping
        if rule is None:
            return False
        # Rank 0 reads the results of a resumed run, and other ranks may have none.
        return self.job.world.on_main(lambda: self._has_stopped_improving(rule))

    def _has_stopped_improving(self, rule: EarlyStopping) -> bool:
        best, best_step, since = -math.inf, 0, 0
        for step in range(1, self.state.step + 1):
            result = self.evaluations.results.get(self._label(step))
            if result is None:
                continue
            score = result.score(rule.task)
            best, best_step, since = (score, step, 0) if score > best else (best, best_step, since + 1)
        if since >= rule.patience:
            waited = counted(since, "evaluation")
            self.job.say(f"stopping early: {rule.task} has not improved in {waited}, since step {best_step}")
        return since >= rule.patience

    def is_evaluated(self, step: int) -> bool:
        """See :meth:`Callbacks.is_evaluated`."""
        return self._label(step) in self.evaluations.results

    def evaluate_at_end(self) -> None:
        """Evaluate the trained model; its last checkpoint may be the best one."""
        result = self.evaluations.measure(run_folder.label_at_end(self.job.recipe))
        if result is None:
            return
        self.tracker.log(result.metrics(), self.state.step)
        self.tracker.summary(result.metrics())
        if self._is_best(result):
            self.saver.keep_as_best()
        self.evaluations.measure_rows(run_folder.label_at_end(self.job.recipe))

    def save(self, wait: bool) -> None:
        """See :meth:`Callbacks.save`."""
        activity.at("saving a checkpoint", self.state.step)
        environment = json.dumps(run_folder.environment())
        documents = {"recipe.yaml": dump_recipe(self.job.recipe), "environment.json": environment}
        self.saver.save(self.state, documents, wait)
        self.job.progress.restart_clock()

    def poll_checkpoint(self) -> None:
        """See :meth:`Callbacks.poll_checkpoint`."""
        self.saver.poll()

    def keep_as_best(self) -> None:
        """See :meth:`Callbacks.keep_as_best`."""
        self.saver.keep_as_best()

    def save_failed(self, step: int) -> None:
        """Send an alert that the checkpoint of ``step`` cannot be written."""
        self.tracker.log({"checkpoint_failed": 1.0}, self.state.step)
        self.tracker.alert(
            "checkpoint failed", f"{self.job.recipe.name}: the checkpoint of step {step} cannot be written"
        )

    def _label(self, step: int) -> str:
        return f"{self.job.recipe.attention.method}, step {step}"

    def _is_best(self, result: EvalResult) -> bool:
        task = self.job.recipe.checkpoint.keep_best
        return task is not None and self.saver.is_best(self.state.step, result.score(task))


def _peak_memory(device: torch.device) -> float:
    """Peak memory of this process in bytes: on the device, or resident in host memory without a device."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
