"""One run from recipe to trained model: load, check, evaluate, train, evaluate, export. Called by every rank."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.data import RowStream, StepLoader, build_rows, collate
from sparsetrain.data.check import check_data
from sparsetrain.durable import write_whole
from sparsetrain.errors import CheckpointError, SparsetrainError
from sparsetrain.evaluation import EvalResult, check_inputs, evaluate
from sparsetrain.evaluation.report import print_results, read_results, write_report
from sparsetrain.methods.full import FullConfig
from sparsetrain.modeling import (
    load_config,
    load_model,
    sparsify,
)
from sparsetrain.recipe import BatchPlan, Recipe, dump_recipe, plan_batch
from sparsetrain.training import checkpoints, folder, selfcheck, sequence_parallel
from sparsetrain.training.belongings import run_folder
from sparsetrain.training.best import score
from sparsetrain.training.build import build_engine
from sparsetrain.training.changes import told
from sparsetrain.training.chat_tokens import settle_chat
from sparsetrain.training.checkpoints import Saver, TrainState
from sparsetrain.training.costs import Costs
from sparsetrain.training.deepspeed_config import deepspeed_config, loads_into_shards
from sparsetrain.training.drawing import draw_run
from sparsetrain.training.engine import World, init_world
from sparsetrain.training.export import export
from sparsetrain.training.faults import explained
from sparsetrain.training.fitting import fit_to_first_rows
from sparsetrain.training.liger import fuse_layers, wants_liger
from sparsetrain.training.loop import Loop, StepResult, is_logged
from sparsetrain.training.place import here
from sparsetrain.training.progress import Progress
from sparsetrain.training.quantize import quantize_base
from sparsetrain.training.ready import check_fit, check_machine
from sparsetrain.training.round_trip import check_round_trip
from sparsetrain.training.signals import Outcome, Stopped, StopSignals
from sparsetrain.training.telling import attempt
from sparsetrain.training.tracking import Tracker
from sparsetrain.training.trainable import choose_trainable, trainable_size
from sparsetrain.training.watch import Watch

T = TypeVar("T")


def run(recipe: Recipe, *, resume: bool = False, signals: StopSignals | None = None) -> Outcome:
    """Train what the recipe says.

    Args:
        resume: continue from the newest complete checkpoint in the run folder, or start if there is none.
        signals: what asks the run to stop, where somebody listens already.

    Returns:
        Whether training reached its end, or who stopped it.

    Raises:
        SparsetrainError: whatever stands in the way, explained, on every rank.
    """
    with ExitStack() as occupied:
        signals = signals or occupied.enter_context(StopSignals())
        try:
            world = init_world(recipe.deepspeed.timeout)
            with Watch(world, 60 * recipe.deepspeed.timeout) as watch, explained(recipe, world, watch):
                signals.last_words, watch.pass_on = watch.tell_stop, signals.pass_on
                return _prepare(recipe, world, watch, signals, resume, occupied).execute(resume)
        except Stopped as stopped:
            return stopped.outcome


def _prepare(
    recipe: Recipe, world: World, watch: Watch, signals: StopSignals, resume: bool, occupied: ExitStack
) -> _Run:
    """Load model and data. What cannot work is refused before anything heavy is loaded."""
    # transformers draws a bar for every folder it reads or writes; this run has its own.
    transformers.utils.logging.disable_progress_bar()
    output = run_folder(recipe)
    _on_main(world, lambda: folder.prepare(output, recipe, resume, occupied))
    check_machine(recipe, world.device, world.size)
    _on_main(world, lambda: check_data(recipe))
    transformers.set_seed(recipe.train.seed)
    here.at("loading the model")
    if recipe.sequence.parallel > 1:
        sequence_parallel.check_config(load_config(recipe.model), recipe.sequence.parallel)
    model, tokenizer = load_model(recipe.model, recipe.attention, seed=recipe.train.seed)
    check_fit(model, recipe)
    # It is written with the model, and others cut their texts at it.
    tokenizer.model_max_length = max(tokenizer.model_max_length, recipe.sequence.length)
    quantize_base(model, recipe.base_bits)
    if not loads_into_shards(recipe):
        model.to(world.device)  # type: ignore[arg-type]
    here.at("reading the data")
    rows = build_rows(recipe.data, recipe.sequence, tokenizer, recipe.train.seed)
    plan = plan_batch(recipe, world.size, rows.rows_per_epoch() if recipe.train.epochs is not None else None)
    return _Run(recipe, output, occupied, world, watch, signals, model, tokenizer, rows, plan)


@dataclass
class _Run:
    recipe: Recipe
    output: Path
    occupied: ExitStack
    world: World
    watch: Watch
    signals: StopSignals
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: RowStream
    plan: BatchPlan

    def execute(self, resume: bool) -> Outcome:
        recipe, world = self.recipe, self.world
        self.progress = Progress(self.plan.steps, 0, self.plan.tokens_per_step, rank=world.rank)
        self.say = self.progress.log
        self.results: dict[str, EvalResult] = {}
        rows = self.plan.global_batch_sequences
        self.state = TrainState(ranks=world.size, rows_per_step=rows, steps=self.plan.steps)
        self.say(f"batch: {self.plan.describe()}")
        for line in self.rows.preview(self.tokenizer) if world.main else ():
            self.say(line)
        if self.rows.chat:
            for line in settle_chat(self.model, self.tokenizer, recipe.lora):
                self.say(line)
        self.costs = Costs.of(self.model, recipe, world)
        self.say(self.costs.describe())

        start = self._find_checkpoint(resume)
        fitted = fit_to_first_rows(self.model, self.rows, world.device)
        if fitted is not None:
            self.say(fitted)
        if wants_liger(recipe.train.liger, world.device):
            self.say(f"kernels: {fuse_layers(self.model, recipe.train.liger, world.device)}")
        if start is None and recipe.eval.at_start:
            self._evaluate_at_start()
        elif recipe.eval.at_end or recipe.eval.every is not None:
            check_inputs(recipe.eval, self.tokenizer, recipe.train.seed)
        if start is not None:
            self._recall_results()

        self.say(choose_trainable(self.model, recipe))
        self.costs = Costs.of(self.model, recipe, world)
        config = deepspeed_config(recipe, self.plan, trainable_size(self.model))
        if world.main:
            text = json.dumps(config, indent=1)
            self._record("deepspeed.json", lambda: write_whole(self.output / "deepspeed.json", text))
        self.engine, self.ulysses = build_engine(self.model, recipe, self.plan, config, world, self.say)
        self.saver = Saver(self.engine, self._checkpoints, recipe.checkpoint, world, self._say, self._save_failed)
        if start is None:
            self._self_check()
        else:
            seed = recipe.train.seed
            self.state = checkpoints.load(self.engine, start, world, self.plan, self.rows, seed=seed, say=self.say)
            self.say(f"resumed {start} at step {self.state.step}")
            for line in self.resumption.record(self.state, self.plan, recipe):
                self.say(line)
        if resume:
            _on_main(world, lambda: folder.describe(self.output, recipe, self.state.history))

        self.tracker = Tracker(
            recipe,
            self.output,
            rank=world.rank,
            resume_id=self.state.wandb_run_id,
            say=self.progress.log,
            remake=lambda: folder.remake(self.output, recipe, self.occupied),
        )
        # Not even step 0 is kept of a run that died before its first checkpoint.
        self.tracker.rewind(-1 if start is None else self.state.step)
        self.state.wandb_run_id = self.tracker.run_id
        self.watch.last_words = self.saver.abandon
        # Around the end of a failed run too: a launcher sends SIGTERM as soon as the first rank has left.
        self.signals.hold()
        try:
            # The other ranks hear of an error before W&B is closed, which may take a minute.
            with explained(recipe, world, self.watch):
                return self._train_to_the_end()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self.saver.abandon()
            self.tracker.finish(exit_code=1)
            raise

    def _train_to_the_end(self) -> Outcome:
        outcome = self._train()
        if outcome is Outcome.FINISHED:
            try:
                self._finish()
            except Stopped as stopped:
                outcome = stopped.outcome
                self.say(f"stopped in {here}; what was trained is saved: --resume does the rest")
        self.tracker.finish()
        # A launcher kills the other ranks as soon as one has left with an exit code: they leave together.
        dist.barrier()
        return outcome

    def _find_checkpoint(self, resume: bool) -> Path | None:
        if not resume:
            return None
        here.at("reading checkpoints")
        newest, skipped = checkpoints.find(self._checkpoints, self.world)
        for line in skipped:
            self.say(line)
        if newest is None:
            _on_main(self.world, lambda: folder.refuse_to_start_over(self.output, skipped))
            self.say(f"nothing to resume in {self.output}; starting from step 0")
        else:
            self.resumption = _on_main(self.world, lambda: folder.resume(self.output, newest, self.recipe))
        return newest

    def _recall_results(self) -> None:
        """Those of the run that is resumed. Files from elsewhere and disks that lie must not end it."""
        try:
            self.results = read_results(self.output)
        except (CheckpointError, OSError) as error:
            self.say(f"warning: {error}; the report goes on without what was measured before")

    @property
    def _checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def _evaluate_at_start(self) -> None:
        """The model dense, as it came, and then with the method put in but not yet trained."""
        if self.recipe.attention.method != "full":
            sparsify(self.model, FullConfig())
            self._evaluate("full attention, before")
            sparsify(self.model, self.recipe.attention)
        self._evaluate(f"{self.recipe.attention.method}, before")

    def _evaluate(self, label: str) -> EvalResult | None:
        """Measure the eval section and keep the result under ``label``."""
        section = self.recipe.eval
        if section.empty:
            return None
        here.at(f"evaluating: {label}", here.step)
        with self.progress.counting(f"evaluating: {label}") as on_progress:

            def moved(done: int, total: int) -> None:
                here.moved()
                on_progress(done, total)
                self.signals.pause(self.world.largest)

            result = evaluate(
                self.model,
                self.tokenizer,
                section,
                device=self.world.device,
                seed=self.recipe.train.seed,
                rank=self.world.rank,
                world=self.world.size,
                on_progress=moved,
            )
        self.results[label] = result
        if self.world.main:
            title = f"Evaluation of {self.recipe.name}"
            self._write_report(title)
        return result

    def _write_report(self, title: str, pictures: Sequence[Path] = ()) -> None:
        history = [told(line) for line in self.state.history]
        self._record(
            "the report",
            lambda: write_report(self.results, self.output, title=title, pictures=pictures, history=history),
        )

    def _record(self, what: str, write: Callable[[], Any]) -> bool:
        """Write what tells of the run and is no part of it."""
        return attempt(f"{what} in {self.output} cannot be written", write, self.say, "the run goes on without it")

    def _self_check(self) -> None:
        """The contract: prove on the first batch that the run does what its recipe says."""
        state = self.rows.state_dict()
        batch = collate([next(self.rows)])
        self.rows.load_state_dict(state)
        for line in (
            selfcheck.check_document_isolation(self.model, batch, self.world, self.ulysses),
            *selfcheck.check_document_alone(self.model, batch, self.world, self.ulysses),
            *selfcheck.check_shared_sequence(self.model, batch, self.world, self.ulysses),
            selfcheck.check_against_whole_model(self.engine.module, batch, self.world),
            selfcheck.check_against_oracle(self.model, batch, self.world, self.ulysses),
            check_round_trip(
                self.model,
                self.output,
                self._export,
                batch.input_ids,
                self.world,
                trust_remote_code=self.recipe.model.trust_remote_code,
            ),
            self.saver.check(),
        ):
            self.say(f"self-check: {line}")

    def _export(self, target: Path, *, whole: bool = False) -> None:
        export(self.model, self.tokenizer, target, self.world, self.recipe.model, whole=whole)

    def _train(self) -> Outcome:
        loader = StepLoader(self.rows, self.plan, self.world.rank)
        loop = Loop(
            engine=self.engine,
            recipe=self.recipe,
            plan=self.plan,
            loader=loader,
            world=self.world,
            state=self.state,
            folder=self.output,
            say=self.say,
            on_step=self._on_step,
            evaluate=self._evaluate_during,
            evaluated=lambda step: self._label(step) in self.results,
            crown=self.saver.crown,
            save=self._save,
            poll_checkpoint=self.saver.poll,
            signals=self.signals,
        )
        if self.state.step == 0:
            self.tracker.log(self.costs.density_by_layer(), 0)
        self.progress = Progress(self.plan.steps, self.state.step, self.plan.tokens_per_step, rank=self.world.rank)
        self.say = loop.say = self.progress.log
        try:
            with self.progress:
                outcome = loop.run()
        finally:
            loader.close()
        if outcome is not Outcome.FINISHED:
            self.say(f"stopped at step {self.state.step} of {self.plan.steps}; continue with --resume")
        return outcome

    def _on_step(self, step: int, result: StepResult) -> None:
        if not is_logged(self.recipe, self.plan, step):
            return
        self.progress.update(step, result.loss, result.lr, result.grad_norm)
        speed = result.tokens / result.seconds
        metrics = {
            "loss": result.loss,
            "perplexity": math.exp(min(result.loss - result.balance_loss, 100.0)),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": self.state.tokens,
            "tokens_per_second": speed,
            "step_seconds": result.seconds,
            "peak_memory_gb": _peak_memory(self.world.device) / 1e9,
            "skipped": float(not result.applied),
            **result.observations,
        }
        if self.recipe.attention.new_modules:
            metrics["lr_new_modules"] = result.lr_new_modules
        utilisation = self.costs.utilisation(speed)
        if utilisation is not None:
            metrics["mfu"] = utilisation
        self.tracker.log(metrics, step)

    def _label(self, step: int) -> str:
        return f"{self.recipe.attention.method}, step {step}"

    def _evaluate_during(self) -> bool:
        result = self._evaluate(self._label(self.state.step))
        if result is not None:
            self.tracker.log(result.metrics(), self.state.step)
        self.progress.restart_clock()
        return result is not None and self._is_best(result)

    def _is_best(self, result: EvalResult) -> bool:
        metric = self.recipe.checkpoint.keep_best
        return metric is not None and self.saver.is_best(self.state.step, score(metric, result))

    def _save(self, wait: bool) -> None:
        here.at("saving a checkpoint", self.state.step)
        documents = {"recipe.yaml": dump_recipe(self.recipe), "environment.json": json.dumps(folder.environment())}
        self.saver.save(self.state, documents, wait)
        self.progress.restart_clock()

    def _save_failed(self, step: int) -> None:
        self.tracker.log({"checkpoint_failed": 1.0}, self.state.step)
        self.tracker.alert("checkpoint failed", f"{self.recipe.name}: the checkpoint of step {step} cannot be written")

    def _say(self, line: str) -> None:
        self.say(line)

    def _finish(self) -> None:
        """Export, evaluate what was trained, draw, and say what came out of it.

        Raises:
            Stopped: that was asked for, before or after the export or in the evaluation.
        """
        self.signals.pause(self.world.largest)
        if self.recipe.checkpoint.export:
            here.at("exporting the model", self.state.step)
            self._export(self.output / "final", whole=True)
            self.signals.pause(self.world.largest)
        if self.recipe.eval.at_end:
            result = self._evaluate(folder.label_at_end(self.recipe))
            if result is not None:
                self.tracker.log(result.metrics(), self.state.step)
                self.tracker.summary(result.metrics())
                if self._is_best(result):
                    self.saver.crown()
        here.at("drawing", self.state.step)
        if self.world.main:
            title = f"{self.recipe.name}: {self.recipe.attention.method} at {self.recipe.sequence.length:,} tokens"
            drawn = list(draw_run(self.model, self.recipe, self.output, self.results, title, self._record))
            for picture in drawn:
                self.tracker.image(picture.stem, picture, self.state.step)
            shown = [picture for picture in drawn if picture.stem == "report"]
            self._write_report(title, shown)
            self._record("the results", lambda: print_results(self.results))
            self.say(f"run folder: {self.output}  (report.md, report.png, metrics.jsonl, checkpoints/)")
            if self.recipe.checkpoint.export:
                final = self.output / "final"
                kind = "trained model" if self.recipe.lora is None else "trained adapters"
                self.say(f"{kind}: {final}; load with sparsetrain.load({str(final)!r})")
        dist.barrier()


def _on_main(world: World, act: Callable[[], T]) -> T:
    """Run ``act`` on rank 0 and give every rank its result, or its error."""
    outcome: list[Any] = [None, None]
    if world.main:
        try:
            outcome[0] = act()
        except SparsetrainError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _peak_memory(device: torch.device) -> float:
    """Peak bytes of this process: on the device, or resident in host memory where there is none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
