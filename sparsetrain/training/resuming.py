"""Find the checkpoint of a resumed run, and restore it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsetrain.activity import activity
from sparsetrain.modeling import balance_factor
from sparsetrain.training import checkpoints
from sparsetrain.training.changes import Resumption
from sparsetrain.training.checkpoints import TrainState
from sparsetrain.training.distributed.build import Engine
from sparsetrain.training.job import Job, Loaded
from sparsetrain.training.output import run_folder


@dataclass(frozen=True)
class Start:
    """The checkpoint to resume from, and the recipe's changes since."""

    checkpoint: Path
    resumption: Resumption


def find_checkpoint(job: Job, loaded: Loaded) -> Start | None:
    """The newest complete checkpoint of the run folder; None if there is none and a new start overwrites nothing.

    Raises:
        CheckpointError: A fresh start would overwrite something, or the recipe changes a setting that must not change.
    """
    activity.at("reading checkpoints")
    newest, skipped = checkpoints.find(job.checkpoints, job.world)
    for line in skipped:
        job.say(line)
    if newest is None:
        job.world.on_main(lambda: run_folder.refuse_to_start_over(job.output, skipped))
        job.say(f"nothing to resume in {job.output}; starting from step 0")
        return None
    balanced = balance_factor(loaded.model) > 0
    resumption = job.world.on_main(lambda: run_folder.resume(job.output, newest, job.recipe, balanced=balanced))
    return Start(newest, resumption)


def restore(job: Job, loaded: Loaded, engine: Engine, start: Start) -> TrainState:
    """Restore the engine, the position in the data and the random states from the checkpoint."""
    rows, plan, seed = loaded.rows, loaded.plan, job.recipe.train.seed
    stage = start.resumption.before.deepspeed.stage
    state = checkpoints.load(
        engine.deepspeed, start.checkpoint, job.world, plan, rows, stage=stage, seed=seed, say=job.say
    )
    job.say(f"resumed {start.checkpoint} at step {state.step}")
    for line in start.resumption.record(state, plan, job.recipe):
        job.say(line)
    return state
