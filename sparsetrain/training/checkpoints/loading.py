"""Load a checkpoint, into an engine with any number of ranks, or as unsharded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sparsetrain.counted import counted
from sparsetrain.data import RowStream
from sparsetrain.errors import CheckpointError
from sparsetrain.recipe import BatchPlan, Recipe, plan_batch
from sparsetrain.recipe.batch import batch_shape
from sparsetrain.training.checkpoints import engine_state
from sparsetrain.training.checkpoints.files import BLOCKWISE, PieceReader
from sparsetrain.training.checkpoints.manifest import STATE, rank_file, tensor_files
from sparsetrain.training.checkpoints.optimizer_state import OtherDivision
from sparsetrain.training.checkpoints.schema import RankFile, StateFile, read
from sparsetrain.training.checkpoints.state import TrainState, draw_random_state, set_random_state
from sparsetrain.world import World


def check_start(checkpoint: Path, before: Recipe, recipe: Recipe, ranks: int) -> None:
    """Refuse what :func:`load` would, as far as the recipes and the metadata show it: before a model is loaded.

    Args:
        before: The recipe of the run that wrote the checkpoint.
        recipe: That of this run.
        ranks: The number of ranks of this run.

    Raises:
        CheckpointError: The checkpoint is of another batch, is beyond the steps of this run, or has 8-bit states of
            another number of ranks.
        RecipeError: The batch or the warmup does not fit this run.
    """
    saved = read(checkpoint / STATE, StateFile)
    _check_rows(checkpoint, saved, ranks, batch_shape(recipe, ranks).global_batch_sequences)
    if recipe.train.epochs is None:  # whose number of steps is known only with the data
        _check_steps(checkpoint, saved, plan_batch(recipe, ranks).steps)
    if saved.ranks != ranks:
        reader = PieceReader(tensor_files(checkpoint))
        if any(reader.names(kind) for kind in BLOCKWISE):
            raise _other_division(checkpoint, saved, before.deepspeed.stage)


def load(
    engine: Any,
    checkpoint: Path,
    world: World,
    plan: BatchPlan,
    rows: RowStream,
    *,
    stage: int,
    seed: int,
    say: Callable[[str], None],
) -> TrainState:
    """Restore the engine, the position in the data and the random state from a complete checkpoint. Called by every
    rank.

    On the same number of ranks the state is restored bit for bit. On another number, the weights, moments, counts and
    the position in the data are restored, but the ranks draw new random numbers (for dropout) and sums round
    differently.

    Args:
        plan: The batch and the steps of this run.
        rows: The training rows of this run.
        stage: The ZeRO stage of the run that wrote the checkpoint.
        seed: Seed of new random numbers.
        say: Prints a line for the user.

    Raises:
        CheckpointError: The checkpoint belongs to another model or batch, is beyond the steps of this run, has 8-bit
            states that other ranks or another stage divide otherwise, or cannot be read.
        DataError: The data has changed.
    """
    try:
        saved = read(checkpoint / STATE, StateFile)
        _check_rows(checkpoint, saved, world.size, plan.global_batch_sequences)
        _check_steps(checkpoint, saved, plan.steps)
        if saved.tokens > saved.step * plan.tokens_per_step:
            raise ValueError(f"it counts {saved.tokens:,} tokens, more than {counted(saved.step, 'step')} can have")
        try:
            engine_state.fill(engine, PieceReader(tensor_files(checkpoint)))
        except OtherDivision as error:
            raise _other_division(checkpoint, saved, stage) from error
        engine_state.set_counters(engine, saved.engine, saved.loss_scale)
        rows.load_state_dict(saved.data)
        if rows.given != saved.step * saved.rows_per_step:
            raise ValueError(f"its position in the data is row {rows.given}, which does not match its step")
        if saved.ranks == world.size:
            set_random_state(read(rank_file(checkpoint, world.rank, "json"), RankFile).random)
        else:
            draw_random_state(seed, saved.step, world.rank)
            say(
                f"resuming on {counted(world.size, 'rank')} a run of {counted(saved.ranks, 'rank')}: the same batches "
                "up to rounding, and new random numbers for dropout"
            )
        return TrainState(
            **saved.model_dump(include={field.name for field in fields(TrainState)}) | {"ranks": world.size}
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}); delete it, and --resume uses the one "
            "before it"
        ) from error


def _check_rows(checkpoint: Path, saved: StateFile, ranks: int, rows: int) -> None:
    if saved.rows_per_step != rows:
        raise CheckpointError(
            f"{checkpoint} was written by {counted(saved.ranks, 'rank')} with {counted(saved.rows_per_step, 'row')} "
            f"per step, but this run of {ranks} has {rows}; add train.global_batch_sequences={saved.rows_per_step}"
        )


def _check_steps(checkpoint: Path, saved: StateFile, steps: int) -> None:
    if saved.step > steps:
        raise CheckpointError(
            f"{checkpoint} is at step {saved.step}, but this run has only {counted(steps, 'step')}; raise "
            f"train.steps (or epochs, or tokens) to at least that, or delete the checkpoint"
        )


def _other_division(checkpoint: Path, saved: StateFile, stage: int) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} has 8-bit optimizer states, scaled by blocks of 256 weights of a rank, and this run "
        f"divides the weights otherwise; resume on {counted(saved.ranks, 'rank')} with deepspeed.stage={stage} "
        "and the same deepspeed.config"
    )


def read_weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a complete checkpoint, by their names in the trained model.

    Returns:
        fp32 tensors in host memory, flattened ``[n]``, because checkpoints do not store shapes.

    Raises:
        OSError, ValueError: The checkpoint cannot be read, or is not a checkpoint.
    """
    reader = PieceReader(tensor_files(Path(checkpoint)))
    names = sorted(reader.names("weight"))
    # In the engine the model is a submodule of the loss.
    return {name.removeprefix("model."): reader.whole("weight", name).float() for name in names}
