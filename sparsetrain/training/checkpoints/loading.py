"""Reading a checkpoint back: into an engine that may be cut for another number of ranks, or as whole weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sparsetrain.data import RowStream
from sparsetrain.errors import CheckpointError
from sparsetrain.recipe import BatchPlan
from sparsetrain.training.checkpoints import engine_state
from sparsetrain.training.checkpoints.files import PieceReader
from sparsetrain.training.checkpoints.manifest import STATE, rank_file, tensor_files
from sparsetrain.training.checkpoints.schema import RankFile, StateFile, read
from sparsetrain.training.checkpoints.state import TrainState, draw_random_state, set_random_state
from sparsetrain.world import World


def load(
    engine: Any,
    checkpoint: Path,
    world: World,
    plan: BatchPlan,
    rows: RowStream,
    *,
    seed: int,
    say: Callable[[str], None],
) -> TrainState:
    """Restore the engine, the position in the data and the random state from a complete checkpoint. Called by every
    rank.

    On as many ranks as wrote it everything is as it was, bit for bit. On another number the weights, moments, counts
    and the position in the data are, while the ranks draw new random numbers (for dropout) and sums round otherwise.

    Args:
        plan: the batch and the steps of this run.
        rows: its training rows.
        seed: where new random numbers come from.
        say: prints a line for the user.

    Raises:
        CheckpointError: it belongs to another model or batch, is further than this run goes, or cannot be read.
        DataError: the data is not what it was.
    """
    try:
        saved = read(checkpoint / STATE, StateFile)
        _check_plan(checkpoint, saved, world, plan)
        engine_state.fill(engine, PieceReader(tensor_files(checkpoint)))
        engine_state.set_counters(engine, saved.engine, saved.loss_scale)
        rows.load_state_dict(saved.data)
        if rows.given != saved.step * saved.rows_per_step:
            raise ValueError(f"its position in the data is that of row {rows.given}, and not that of its step")
        if saved.ranks == world.size:
            set_random_state(read(rank_file(checkpoint, world.rank, "json"), RankFile).random)
        else:
            draw_random_state(seed, saved.step, world.rank)
            say(
                f"taking up on {_ranks(world.size)} what {_ranks(saved.ranks)} left: the same batches, equal but for "
                "rounding, and new random numbers for dropout"
            )
        return TrainState(
            **saved.model_dump(include={field.name for field in fields(TrainState)}) | {"ranks": world.size}
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}); delete it, and --resume takes the one "
            "before it"
        ) from error


def _check_plan(checkpoint: Path, saved: StateFile, world: World, plan: BatchPlan) -> None:
    rows = plan.global_batch_sequences
    if saved.rows_per_step != rows:
        raise CheckpointError(
            f"{checkpoint} was written by {_ranks(saved.ranks)} with {saved.rows_per_step} rows in a step, and this "
            f"run of {world.size} makes it {rows}; add train.global_batch_sequences={saved.rows_per_step}"
        )
    if saved.step > plan.steps:
        raise CheckpointError(
            f"{checkpoint} is at step {saved.step}, and this run has {plan.steps}; make train.steps (or epochs, or "
            f"tokens) at least that much, or delete the checkpoint"
        )
    if saved.tokens > saved.step * plan.tokens_per_step:
        raise ValueError(f"it counts {saved.tokens:,} tokens, more than {saved.step} steps hold")


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def read_weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a complete checkpoint by their names in the model that was trained: fp32, each laid out
    flat (checkpoints know no shapes), in host memory.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    reader = PieceReader(tensor_files(Path(checkpoint)))
    names = sorted(reader.names("weight"))
    # The engine holds the model inside of its loss.
    return {name.removeprefix("model."): reader.whole("weight", name) for name in names}
