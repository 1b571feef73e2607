"""A run from recipe to trained model, in four stages: prepare, build, train, finish. Called by every rank.

Each stage is a function that takes the results of the previous ones.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import transformers

from sparsetrain.activity import activity
from sparsetrain.data import StepLoader, build_rows
from sparsetrain.data.check import check_data
from sparsetrain.durable import write_whole
from sparsetrain.evaluation.metrics import FINISHED, PLANNED_STEPS
from sparsetrain.evaluation.report import print_results
from sparsetrain.modeling import load_config, load_model
from sparsetrain.modeling.continued import merge_start
from sparsetrain.recipe import Recipe, plan_batch
from sparsetrain.training.callbacks import RunCallbacks
from sparsetrain.training.chat_tokens import set_end_tokens
from sparsetrain.training.checkpoints import Saver, TrainState
from sparsetrain.training.checkpoints.engine_state import describe_optimizer
from sparsetrain.training.distributed import sequence_parallel
from sparsetrain.training.distributed.build import Engine, build_engine
from sparsetrain.training.distributed.deepspeed_config import deepspeed_config, loads_into_shards
from sparsetrain.training.distributed.engine import init_world, own_linear
from sparsetrain.training.distributed.optimizers import eager_muon
from sparsetrain.training.fitting import fit_to_first_rows
from sparsetrain.training.job import Job, Loaded
from sparsetrain.training.loop import Loop
from sparsetrain.training.memory.liger import fuse_layers, wants_liger
from sparsetrain.training.memory.quantize import quantize_base
from sparsetrain.training.output import run_folder
from sparsetrain.training.output.costs import Costs
from sparsetrain.training.output.evaluations import Evaluations, results_before_training
from sparsetrain.training.output.export import export
from sparsetrain.training.output.folder_contents import output_folder
from sparsetrain.training.output.pictures import draw_run
from sparsetrain.training.output.progress import Progress
from sparsetrain.training.output.run_list import LOG_FILE
from sparsetrain.training.output.tracking import Tracker
from sparsetrain.training.preference.measure import measure_reference
from sparsetrain.training.preflight import check_loaded, check_machine
from sparsetrain.training.resuming import find_checkpoint, restore
from sparsetrain.training.selfcheck.first_batch import check_before_training
from sparsetrain.training.supervision.faults import explained
from sparsetrain.training.supervision.signals import Outcome, Stopped, StopSignals
from sparsetrain.training.supervision.watch import Watch
from sparsetrain.training.trainable import choose_trainable, trainable_size


def run(recipe: Recipe, *, resume: bool = False, signals: StopSignals | None = None) -> Outcome:
    """Train as the recipe says.

    Args:
        resume: Continue from the newest complete checkpoint in the run folder, or start if there is none.
        signals: Handlers of stop signals, if they are installed already.

    Returns:
        Whether training was completed, or by whom it was stopped.

    Raises:
        SparsetrainError: The run cannot start or continue, on every rank.
    """
    with own_linear(), ExitStack() as cleanup:
        signals = signals or cleanup.enter_context(StopSignals())
        try:
            world = init_world(recipe.deepspeed.timeout)
            cleanup.enter_context(eager_muon(recipe, world.device))
            with Watch(world, 60 * recipe.deepspeed.timeout) as watch, explained(recipe, world, watch):
                # A rank that ends with a stuck main thread tells the others; a stop of another rank stops this one.
                signals.before_exit, watch.pass_on = watch.tell_stop, signals.pass_on
                job = Job(recipe, output_folder(recipe), world, signals, Progress(rank=world.rank), cleanup)
                loaded = prepare(job, resume)
                built = build(job, loaded, resume)
                watch.before_exit = built.callbacks.saver.abandon
                # This includes the end of a failed run: a launcher sends SIGTERM as soon as the first rank has exited.
                signals.hold()
                with _closing(job, built, watch):
                    return train_and_finish(job, loaded, built)
        except Stopped as stopped:
            return stopped.outcome


@dataclass(frozen=True)
class Built:
    """The engine and the other objects for training, after all checks."""

    engine: Engine
    callbacks: RunCallbacks


@contextmanager
def _closing(job: Job, built: Built, watch: Watch) -> Iterator[None]:
    """Within it, an error completes the pending checkpoint and closes W&B."""
    try:
        # The other ranks are told of the error before W&B is closed, which may take a minute.
        with explained(job.recipe, job.world, watch):
            yield
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            built.callbacks.saver.abandon()
        built.callbacks.tracker.finish(exit_code=1)
        raise


def prepare(job: Job, resume: bool) -> Loaded:
    """Check the recipe and the machine, then load model and data."""
    # transformers shows a progress bar for every folder it reads or writes; a run has its own.
    transformers.utils.logging.disable_progress_bar()
    recipe, world = job.recipe, job.world
    world.on_main(lambda: run_folder.prepare(job.output, recipe, resume, world.size, job.cleanup))
    job.progress.keep(job.output / LOG_FILE, job.cleanup)
    job.progress.relay(logging.getLogger("sparsetrain.data"), job.cleanup)
    check_machine(recipe, world.device, world.size)
    world.on_main(lambda: check_data(recipe))
    _seed(recipe.train.seed)
    activity.at("loading the model")
    if recipe.sequence.parallel > 1:
        sequence_parallel.check_config(load_config(recipe.model), recipe.sequence.parallel, recipe.attention)
    model, tokenizer = load_model(recipe.model, recipe.attention, seed=recipe.train.seed)
    check_loaded(model, recipe)
    if recipe.train.start is not None and recipe.lora is None:
        merge_start(model, recipe.train.start)
        job.say(f"merged the adapters in {recipe.train.start} into the weights")
    # It is saved with the model, and other programs truncate texts to it.
    tokenizer.model_max_length = max(tokenizer.model_max_length, recipe.sequence.length)
    quantize_base(model, recipe.base_bits)
    if not loads_into_shards(recipe):
        model.to(world.device)  # type: ignore[arg-type]
    activity.at("reading the data")
    pairs = recipe.preference is not None
    rows = build_rows(recipe.data, recipe.sequence, tokenizer, recipe.train.seed, pairs=pairs)
    plan = plan_batch(recipe, world.size, rows.rows_per_epoch() if recipe.train.epochs is not None else None)
    return Loaded(model, tokenizer, rows, plan)


def _seed(seed: int) -> None:
    """As transformers' ``set_seed`` does, whose module imports peft, and with it bitsandbytes: seconds."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of all devices


def build(job: Job, loaded: Loaded, resume: bool) -> Built:
    """Evaluate the original model, choose the trained parameters, build the engine, and check or resume it."""
    recipe, world, model, plan = job.recipe, job.world, loaded.model, loaded.plan
    _introduce(job, loaded)
    start = find_checkpoint(job, loaded) if resume else None
    fit_to_first_rows(model, loaded.rows, world.device, job.say)
    if wants_liger(recipe.train.liger, world.device):
        job.say(f"kernels: {fuse_layers(model, recipe.train.liger, world.device)}")
    results = results_before_training(job, loaded, resumed=start is not None)

    job.say(choose_trainable(model, recipe))
    costs = Costs.of(model, recipe, world)
    config = deepspeed_config(recipe, plan, trainable_size(model))
    if world.main:
        job.record("deepspeed.json", lambda: write_whole(job.output / "deepspeed.json", json.dumps(config, indent=1)))
    engine = build_engine(model, recipe, plan, config, world, job.say)
    job.say(f"optimizer: {describe_optimizer(engine.deepspeed)}")
    if recipe.reference == "precomputed":
        engine.deepspeed.module.reference = measure_reference(job, loaded, engine.deepspeed.module)
    saver = Saver(engine.deepspeed, job.checkpoints, recipe.checkpoint, world, job.say)
    if start is None:
        check_before_training(job, loaded, engine, saver)
        state = TrainState(ranks=world.size, rows_per_step=plan.global_batch_sequences, steps=plan.steps)
    else:
        state = restore(job, loaded, engine, start)
    if resume:
        world.on_main(lambda: run_folder.describe(job.output, recipe, state.history))
    tracker = _track(job, state, resumed=start is not None)
    if start is None:
        tracker.text("data/first_row", loaded.rows.first_text(loaded.tokenizer), 0)
    evaluations = Evaluations(job, model, loaded.tokenizer, results, state.history)
    callbacks = RunCallbacks(job, plan, state, costs, saver, tracker, evaluations)
    saver.on_failure = callbacks.save_failed
    if recipe.wandb.artifacts:
        saver.on_complete = tracker.artifact
    return Built(engine, callbacks)


def train_and_finish(job: Job, loaded: Loaded, built: Built) -> Outcome:
    """Train, and if all steps are done, export, evaluate and draw the trained model."""
    outcome = train(job, loaded, built)
    if outcome is Outcome.FINISHED:
        try:
            finish(job, loaded, built.callbacks)
        except Stopped as stopped:
            outcome = stopped.outcome
            job.say(f"stopped in {activity}; the trained weights are saved: continue with --resume")
        else:
            end = {FINISHED: 1.0, PLANNED_STEPS: float(loaded.plan.steps)}
            built.callbacks.tracker.log(end, built.callbacks.state.step)
    built.callbacks.tracker.finish()
    # A launcher kills the other ranks as soon as one exits with an error code, so all exit together.
    dist.barrier()
    return outcome


def train(job: Job, loaded: Loaded, built: Built) -> Outcome:
    """Run the remaining steps."""
    plan, callbacks, state = loaded.plan, built.callbacks, built.callbacks.state
    loader = StepLoader(loaded.rows, plan, job.world.rank)
    loop = Loop(job, plan, built.engine.deepspeed, loader, state, callbacks)
    unchanging = callbacks.costs.unchanging() if state.step == 0 else {}
    if state.step < plan.steps:
        callbacks.tracker.log(unchanging | {PLANNED_STEPS: float(plan.steps)}, state.step)
    job.progress.begin(plan.steps, state.step, plan.tokens_per_step)
    try:
        with job.progress:
            outcome = loop.run()
    finally:
        loader.close()
    if callbacks.profiler is not None:
        callbacks.profiler.close(state.step)
    if outcome is not Outcome.FINISHED:
        job.say(f"stopped at step {state.step} of {plan.steps}; continue with --resume")
    return outcome


def finish(job: Job, loaded: Loaded, callbacks: RunCallbacks) -> None:
    """Export and evaluate the trained model, draw pictures, and print the results.

    Raises:
        Stopped: The run was asked to stop before or after the export, or in the evaluation.
    """
    recipe, world, step = job.recipe, job.world, callbacks.state.step
    final = job.output / "final"
    job.signals.pause(world.largest)
    if recipe.checkpoint.export:
        activity.at("exporting the model", step)
        export(loaded.model, loaded.tokenizer, final, world, recipe.model, whole=True)
        job.signals.pause(world.largest)
    if recipe.eval.at_end:
        callbacks.evaluate_at_end()
    activity.at("drawing", step)
    if world.main:
        results = callbacks.evaluations.results
        title = f"{recipe.name}: {recipe.attention.method} at {recipe.sequence.length:,} tokens"
        drawn = list(draw_run(loaded.model, recipe, job.output, results, title, job.record))
        for picture in drawn:
            callbacks.tracker.image(picture.stem, picture, step)
        callbacks.evaluations.write_report(title, [picture for picture in drawn if picture.stem == "report"])
        callbacks.evaluations.write_page()
        callbacks.evaluations.forget_samples()
        job.record("the results", lambda: print_results(results))
        job.say(f"run folder: {job.output}  (report.html, report.md, report.png, metrics.jsonl, checkpoints/)")
        if recipe.checkpoint.export:
            kind = "trained model" if recipe.lora is None else "trained adapters"
            job.say(f"{kind}: {final}; load with sparsetrain.load({str(final)!r})")
    dist.barrier()


def _introduce(job: Job, loaded: Loaded) -> None:
    """Print the batch, the first documents and the model's costs, and set the end tokens of its chats."""
    job.say(f"batch: {loaded.plan.describe()}")
    for line in loaded.rows.preview(loaded.tokenizer) if job.world.main else ():
        job.say(line)
    if loaded.rows.chat:
        for line in set_end_tokens(loaded.model, loaded.tokenizer, job.recipe.lora):
            job.say(line)
    job.say(Costs.of(loaded.model, job.recipe, job.world).describe())


def _track(job: Job, state: TrainState, *, resumed: bool) -> Tracker:
    """The tracker of W&B and ``metrics.jsonl``, which continues after the last step of the checkpoint."""
    tracker = Tracker(
        job.recipe,
        job.output,
        rank=job.world.rank,
        resume_id=state.wandb_run_id,
        say=job.say,
        remake=lambda: run_folder.remake(job.output, job.recipe, job.cleanup),
    )
    # Also drop step 0 of a run that died before its first checkpoint.
    tracker.rewind(state.step if resumed else -1)
    state.wandb_run_id = tracker.run_id
    return tracker
