"""Check that the content of a checkpoint is consistent, before its tensors are read and without an engine."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from sparsetrain.durable import read_bytes
from sparsetrain.errors import RecipeError
from sparsetrain.recipe import Recipe, load_recipe
from sparsetrain.training.checkpoints.files import PieceReader
from sparsetrain.training.checkpoints.manifest import RECIPE, STATE, rank_file, read_manifest, tensor_files
from sparsetrain.training.checkpoints.schema import RankFile, StateFile, read

MOMENTS = ("exp_avg", "exp_avg_sq")


def content_fault(checkpoint: Path) -> str | None:
    """An inconsistency in a checkpoint whose files are complete; None if there is none."""
    try:
        state = read(checkpoint / STATE, StateFile)
        if checkpoint.name != (name := f"step-{state.step:06d}"):
            return f"it holds the state of {name}"
        if state.step > state.steps:
            return f"it is at step {state.step} of a run of {state.steps}"
        if state.engine.global_steps != state.step:
            return f"its engine counts {state.engine.global_steps} steps, and its run {state.step}"
        written = read_manifest(checkpoint)
        for rank in range(state.ranks):
            record, tensors = (rank_file(checkpoint, rank, suffix) for suffix in ("json", "safetensors"))
            if read(record, RankFile).file != written[tensors.name]:
                return f"{record.name} belongs to another {tensors.name}"
        recorded_recipe(checkpoint)
        return _tensors_fault(PieceReader(tensor_files(checkpoint)), state)
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    except RecipeError as error:
        return f"its {RECIPE} cannot be read: {' '.join(str(error).split())}"


def recorded_recipe(checkpoint: Path) -> Recipe:
    """The recipe of the run that wrote a checkpoint.

    Raises:
        OSError, ValueError, RecipeError: The recipe cannot be read.
    """
    read_bytes(checkpoint / RECIPE)
    return load_recipe(checkpoint / RECIPE).recipe


def _tensors_fault(reader: PieceReader, state: StateFile) -> str | None:
    """An inconsistency in the names, sizes or step counts of the tensors; None if there is none."""
    weights = {name: reader.numel("weight", name) for name in reader.names("weight")}
    if not weights:
        return "it holds no weights"
    moments = {kind: {name: reader.numel(kind, name) for name in reader.names(kind)} for kind in MOMENTS}
    counts = {name: reader.numel("step", name) for name in reader.names("step")}
    if state.engine.global_steps == state.engine.skipped_steps and not any((*moments.values(), counts)):
        return None  # no step has been applied
    for kind in MOMENTS:
        if moments[kind] != weights:
            name = next(iter(sorted({*moments[kind].items()} ^ {*weights.items()})))[0]
            return f"its {kind} does not match its weights, at {name}"
    if counts != dict.fromkeys(weights, 1):
        return "it does not count the steps of every weight"
    for name in counts:
        count = reader.whole("step", name).item()
        if not (0 <= count <= state.step and count == int(count)):
            return f"it counts {count:g} steps of {name}, and its run {state.step}"
    return None
