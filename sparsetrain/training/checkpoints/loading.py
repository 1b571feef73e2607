"""Reading a checkpoint back: into an engine that may be cut for another number of ranks, or as whole weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sparsetrain.errors import CheckpointError
from sparsetrain.training.checkpoints import engine_state
from sparsetrain.training.checkpoints.files import PieceReader
from sparsetrain.training.checkpoints.manifest import STATE, rank_file, tensor_files
from sparsetrain.training.checkpoints.state import TrainState, draw_random_state, set_random_state
from sparsetrain.training.engine import World


def load(
    engine: Any, checkpoint: Path, world: World, *, rows_per_step: int, seed: int, say: Callable[[str], None]
) -> TrainState:
    """Restore the engine and the random state from a complete checkpoint. Called by every rank.

    On as many ranks as wrote it everything is as it was, bit for bit. On another number the weights, moments, counts
    and the position in the data are, while the ranks draw new random numbers (for dropout) and sums round otherwise.

    Args:
        rows_per_step: rows of the global batch of this run.
        seed: where new random numbers come from.
        say: prints a line for the user.

    Raises:
        CheckpointError: it belongs to another model or batch, or cannot be read.
    """
    try:
        saved = json.loads((checkpoint / STATE).read_text())
        state = TrainState(**{field.name: saved[field.name] for field in fields(TrainState)})
        if not all(type(count) is int for count in (state.step, state.tokens, state.rows_per_step)):
            raise ValueError("state.json does not count in whole numbers")
        if state.rows_per_step != rows_per_step:
            raise CheckpointError(
                f"{checkpoint} was written by {state.ranks} ranks with {state.rows_per_step} rows in a step, and this "
                f"run of {world.size} makes it {rows_per_step}; add train.global_batch_sequences={state.rows_per_step}"
            )
        engine_state.fill(engine, PieceReader(tensor_files(checkpoint)))
        engine_state.set_counters(engine, saved)
        if state.ranks == world.size:
            record = json.loads(rank_file(checkpoint, world.rank, "json").read_text())
            set_random_state(record["random"])
        else:
            draw_random_state(seed, state.step, world.rank)
            say(
                f"taking up on {_ranks(world.size)} what {_ranks(state.ranks)} left: the same batches, equal but for "
                "rounding, and new random numbers for dropout"
            )
        state.ranks = world.size
        return state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}); delete it, and --resume takes the one "
            "before it"
        ) from error


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
