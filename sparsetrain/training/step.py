"""One optimizer step on a DeepSpeed engine: learning rates, passes, the update, and what the ranks report of it.

The loss is the mean over all target tokens of the global batch: each micro batch contributes its summed NLL, divided by
the number of targets over all ranks and accumulation steps. With ``preference`` it is the mean over its pairs, in the
same way. Dividing the batch differently into micro batches and ranks therefore only changes rounding. The exception is
the routers' balance loss, a product of two means over the tokens of a micro batch; it is averaged over all tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from sparsetrain.activity import activity
from sparsetrain.data import Batch, Step
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
from sparsetrain.training.schedule import new_modules_peak, peak_lr, share_of_peak
from sparsetrain.training.selfcheck.forward import GradientWatch
from sparsetrain.training.supervision.signals import Outcome


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


@dataclass
class Stepper:
    """Takes the optimizer steps of a run, one at a time.

    Args:
        engine: The DeepSpeed engine around :class:`~sparsetrain.training.loss.CausalLMLoss`.
        state: Its ``step`` counts the steps taken so far; the caller counts.
    """

    job: Job
    plan: BatchPlan
    engine: Any
    state: TrainState
    methods: list[Method] = field(init=False)

    def __post_init__(self) -> None:
        found = {id(method): method for _, _, method in sparse_layers(self.engine.module) if method is not None}
        self.methods = list(found.values())

    def take(self, batch: Step, watch: GradientWatch | None) -> tuple[StepResult, Outcome | None]:
        """Take one step.

        Args:
            watch: Checks, before the update, that every trained parameter has got a gradient.

        Returns:
            The step's metrics, and how the run ends if any rank was asked to stop, else None.
        """
        began = time.perf_counter()
        train = self.job.recipe.train
        share = self._begin_step()
        counts = self._counts(batch)
        sums, norms = self._passes(batch, counts, watch)
        means, tokens, stop = self._over_ranks(sums, counts)
        norm = self.engine.get_global_grad_norm()
        loss = means.pop("loss")
        result = StepResult(
            loss=loss,
            balance_loss=means.get("balance_loss", 0.0),
            lr=share * peak_lr(train)[1],
            lr_new_modules=share * new_modules_peak(train),
            grad_norm=0.0 if norm is None else float(norm),
            tokens=tokens,
            applied=bool(self.engine.was_step_applied()),
            seconds=time.perf_counter() - began,
            observations=self._observations() | norms | means,
        )
        return result, stop

    def _begin_step(self) -> float:
        """Set the learning rates and prepare the methods; returns the rates' share of their peaks."""
        share = share_of_peak(self.job.recipe.train, self.state.step, self.plan.steps, self.plan.warmup_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        for method in self.methods:
            method.begin_step(self.state.step, self.plan.steps)
            method.observing = self._is_logged
        return share

    @property
    def _is_logged(self) -> bool:
        """Whether the step that is being taken is logged."""
        return is_logged(self.job.recipe, self.plan, self.state.step + 1)

    def _counts(self, batch: Step) -> torch.Tensor:
        """The step's targets (or pairs) first and its tokens last, summed over ranks. They stay on the device, so that
        nothing waits for them before the end of the step."""
        of_batches = [(*self.engine.module.counts(micro), micro.num_tokens) for micro in batch.micro_batches]
        counts = self._on_device(*map(sum, zip(*of_batches)))
        dist.all_reduce(counts)
        return counts

    def _passes(
        self, batch: Step, counts: torch.Tensor, watch: GradientWatch | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Forward and backward of each micro batch, and the update.

        Returns:
            This rank's sums over the micro batches, fp64 scalars on the device: ``loss``, ``balance_loss`` if the model
            adds one, and :attr:`CausalLMLoss.sums`. Then the norms of the gradient's parts, if they are logged.
        """
        module: CausalLMLoss = self.engine.module
        targets, tokens = counts[0].clamp(min=1.0), counts[-1]
        shares = module.shares(counts)
        # ZeRO averages gradients over ranks; the factor turns this into the sum that the global mean needs.
        factor = (1.0 / targets * self.job.world.size).float()
        sums: dict[str, torch.Tensor] = {}
        norms: dict[str, float] = {}
        for index, micro in enumerate(batch.micro_batches):
            activity.at("forward", self.state.step + 1)
            # Each token has equal weight in the balance loss, in any micro batch and on any rank.
            weight = micro.num_tokens * targets / tokens
            loss = self.engine(**self._inputs(micro), **shares, balance_weight=weight.float())
            activity.at("backward", self.state.step + 1)
            self.engine.backward(loss * factor, scale_wrt_gas=False)
            found = {"loss": loss.detach().double()}
            if module.balance_loss is not None:
                found["balance_loss"] = module.balance_loss * weight
            sums = {name: sums.get(name, 0.0) + value for name, value in (found | module.sums).items()}
            if index + 1 == len(batch.micro_batches):
                norms = self._look_at_gradients(watch)
            activity.at("optimizer step", self.state.step + 1)
            self.engine.step()
        return sums, norms

    def _look_at_gradients(self, watch: GradientWatch | None) -> dict[str, float]:
        """Check and measure the whole gradient before the update; returns the norms of its parts if they are logged."""
        if watch is not None:
            self.job.say(f"self-check: {watch.check()}")
        if isinstance(self.engine.optimizer, FiniteStep):
            self.engine.optimizer.measure()
        return gradient_norms(self.engine) if self.job.recipe.train.gradient_norms and self._is_logged else {}

    def _over_ranks(
        self, sums: dict[str, torch.Tensor], counts: torch.Tensor
    ) -> tuple[dict[str, float], int, Outcome | None]:
        """Means over the step's targets on all ranks, its tokens, and how the run ends if any rank was asked to stop.

        Here the host waits for the device; until then a signal is honoured.
        """
        asked = self._on_device(self.job.signals.preempted, self.job.signals.interrupted)
        of_all = torch.cat([torch.stack([*sums.values()]), asked])
        dist.all_reduce(of_all)
        means = of_all[:-2] * (1.0 / counts[0].clamp(min=1.0))
        *values, tokens, preempted, interrupted = torch.cat([means, counts[-1:], of_all[-2:]]).tolist()
        # DeepSpeed's launcher adds a SIGTERM to a Ctrl-C.
        stop = Outcome.INTERRUPTED if interrupted else Outcome.PREEMPTED if preempted else None
        return dict(zip(sums, values, strict=True)), int(tokens), stop

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
