"""The training loop on a DeepSpeed engine; start reading at :meth:`Loop.run`.

The loss is the mean over all target tokens of the global batch: each micro batch contributes its summed NLL, divided by
the number of targets over all ranks and accumulation steps. With ``preference`` it is the mean over its pairs, in the
same way. Dividing the batch differently into micro batches and ranks
therefore only changes rounding. The exception is the routers' balance loss, a product of two means over the tokens of a
micro batch; it is averaged over all tokens.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsetrain.activity import activity
from sparsetrain.data import Batch, Step, StepLoader
from sparsetrain.errors import TrainingError
from sparsetrain.methods.base import Method
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.passes import planned_arguments
from sparsetrain.recipe.batch import BatchPlan
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.checkpoints import TrainState
from sparsetrain.training.distributed.optimizers import FiniteStep
from sparsetrain.training.gradient_norms import gradient_norms
from sparsetrain.training.job import Job
from sparsetrain.training.loss import CausalLMLoss, pass_tensors
from sparsetrain.training.memory.chunks import chunks_of
from sparsetrain.training.output.attempt import attempt
from sparsetrain.training.schedule import new_modules_peak, peak_lr, share_of_peak
from sparsetrain.training.selfcheck.forward import GradientWatch
from sparsetrain.training.supervision.signals import Outcome, Stopped


@dataclass(frozen=True)
class StepResult:
    """The metrics of one optimizer step."""

    loss: float
    """Mean NLL per target token of the global batch, in nats, or with ``preference`` the mean loss of a pair; plus the
    routers' balance loss if there is one."""
    balance_loss: float
    """The balance loss alone, averaged over the tokens of the global batch; 0 if the model adds none."""
    lr: float
    """Learning rate of the model or its adapters, or of the new modules if only they are trained."""
    lr_new_modules: float
    """Learning rate of the modules that the attention method adds."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    tokens: int
    """Tokens of the global batch."""
    applied: bool
    """False if a gradient was not finite and the step was skipped."""
    seconds: float
    observations: dict[str, float]
    """Statistics of the attention methods in a logged step, averaged over the ranks, and norms of the gradient's parts;
    empty in other steps."""


def is_logged(recipe: Recipe, plan: BatchPlan, step: int) -> bool:
    """Whether the metrics of ``step`` (1 is the first) are recorded: every ``train.log_every`` steps, and the last."""
    return step % recipe.train.log_every == 0 or step == plan.steps


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
    methods: list[Method] = field(init=False)

    def __post_init__(self) -> None:
        found = {id(method): method for _, _, method in sparse_layers(self.engine.module) if method is not None}
        self.methods = list(found.values())

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
            self.callbacks.before_step(self.state.step + 1)
            activity.at("waiting for data", self.state.step + 1)
            batch = next(self.loader)
            result, stop = self._step(batch, watch)
            watch = None
            if not (result.applied and math.isfinite(result.loss)):
                self._nonfinite(batch, result)
            self.state.step += 1
            self.state.tokens += result.tokens
            self.state.data = batch.state
            self.callbacks.on_step(self.state.step, result)
            self.callbacks.poll_checkpoint()
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
            if stop is not None and not finished:
                return stop
            if finished:
                break
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

    def _step(self, batch: Step, watch: GradientWatch | None) -> tuple[StepResult, Outcome | None]:
        """One optimizer step. The second value is how the run ends if any rank was asked to stop, else None."""
        began = time.perf_counter()
        train = self.job.recipe.train
        share = share_of_peak(train, self.state.step, self.plan.steps, self.plan.warmup_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        for method in self.methods:
            method.begin_step(self.state.step, self.plan.steps)
            method.observing = is_logged(self.job.recipe, self.plan, self.state.step + 1)

        # The numbers of targets (or pairs) and tokens, summed over ranks; they stay on the device until the end of the
        # step.
        module: CausalLMLoss = self.engine.module
        of_batches = [(*module.counts(micro), micro.num_tokens) for micro in batch.micro_batches]
        counts = self._on_device(*map(sum, zip(*of_batches)))
        dist.all_reduce(counts)
        scale, tokens_in_step = 1.0 / counts[0].clamp(min=1.0), counts[-1]
        shares = module.shares(counts)

        total = torch.zeros((), dtype=torch.float64, device=self.job.world.device)
        balance = torch.zeros_like(total)
        measured: dict[str, torch.Tensor] = {}
        norms: dict[str, float] = {}
        for index, micro in enumerate(batch.micro_batches):
            activity.at("forward", self.state.step + 1)
            # Each token has equal weight in the balance loss, in any micro batch and on any rank.
            weight = micro.num_tokens * counts[0].clamp(min=1.0) / tokens_in_step
            loss = self.engine(**self._inputs(micro), **shares, balance_weight=weight.float())
            activity.at("backward", self.state.step + 1)
            # ZeRO averages gradients over ranks; the factor turns this into the sum that the global mean needs.
            self.engine.backward(loss * (scale * self.job.world.size).float(), scale_wrt_gas=False)
            total += loss.detach()
            if (found := module.balance_loss) is not None:
                balance += found * weight
            measured = {name: measured.get(name, 0.0) + value for name, value in module.sums.items()}
            if index + 1 == len(batch.micro_batches):
                if watch is not None:
                    self.job.say(f"self-check: {watch.check()}")
                if isinstance(self.engine.optimizer, FiniteStep):
                    self.engine.optimizer.measure()
                if train.gradient_norms and is_logged(self.job.recipe, self.plan, self.state.step + 1):
                    norms = gradient_norms(self.engine)
            activity.at("optimizer step", self.state.step + 1)
            self.engine.step()

        # A signal is honoured on any rank and until the end of the step.
        sums = torch.cat(
            [
                torch.stack([total, balance, *measured.values()]),
                self._on_device(self.job.signals.preempted, self.job.signals.interrupted),
            ]
        )
        dist.all_reduce(sums)
        means, asked = sums[:-2] * scale, sums[-2:]
        values: list[float] = torch.cat([means, tokens_in_step[None], asked]).tolist()
        loss_value, balance_loss, *of_pairs, tokens, preempted, interrupted = values
        norm = self.engine.get_global_grad_norm()
        result = StepResult(
            loss=loss_value,
            balance_loss=balance_loss,
            lr=share * peak_lr(train)[1],
            lr_new_modules=share * new_modules_peak(train),
            grad_norm=0.0 if norm is None else float(norm),
            tokens=int(tokens),
            applied=bool(self.engine.was_step_applied()),
            seconds=time.perf_counter() - began,
            observations=self._observations()
            | norms
            | ({"balance_loss": balance_loss} if module.balance else {})
            | dict(zip(measured, of_pairs, strict=True)),
        )
        # DeepSpeed's launcher adds a SIGTERM to a Ctrl-C.
        stop = Outcome.INTERRUPTED if interrupted else Outcome.PREEMPTED if preempted else None
        return result, stop

    def _on_device(self, *values: float) -> torch.Tensor:
        """Values of this rank as an fp64 tensor, to be summed over ranks; the copy is asynchronous."""
        return torch.tensor(values, dtype=torch.float64).to(self.job.world.device, non_blocking=True)

    def _observations(self) -> dict[str, float]:
        """The statistics of methods with telemetry in this step, averaged over the ranks."""
        observers = [m for m in self.methods if m.observing and type(m).observations is not Method.observations]
        for method in self.methods:
            method.observing = False
        if not observers:
            return {}
        mine = {name: value for method in observers for name, value in method.observations().items()}
        of_ranks: list[Any] = [None] * self.job.world.size
        dist.all_gather_object(of_ranks, mine)
        # A rank may lack what its texts are too short for.
        found: dict[str, list[float]] = {}
        for each in of_ranks:
            for name, value in each.items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _inputs(self, micro: Batch) -> dict[str, Any]:
        """The arguments of :class:`~sparsetrain.training.loss.CausalLMLoss`, on the device."""
        tensors = {**pass_tensors(micro), **self.engine.module.arguments(micro)}
        inputs: dict[str, Any] = {name: t.to(self.job.world.device, non_blocking=True) for name, t in tensors.items()}
        # From the recipe, not from this batch: the number of chunks must be equal on all ranks.
        inputs["num_chunks"] = chunks_of(self.plan.tokens_per_pass, self.job.recipe.train.loss_chunk)
        draw = {"seed": self.job.recipe.train.seed, "step": self.state.step}
        inputs["planned"] = planned_arguments(self.methods, micro, **draw)
        return inputs

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
