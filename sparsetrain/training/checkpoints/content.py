"""Check that the content of a checkpoint is consistent, before its tensors are read and without an engine."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from sparsetrain.counted import counted
from sparsetrain.durable import read_bytes
from sparsetrain.errors import RecipeError
from sparsetrain.recipe import Recipe, load_recipe
from sparsetrain.training.checkpoints.files import ELEMENTWISE, FACTORS, PieceReader
from sparsetrain.training.checkpoints.manifest import RECIPE, STATE, rank_file, read_manifest, tensor_files
from sparsetrain.training.checkpoints.schema import RankFile, StateFile, read

OF_OPTIMIZERS = (
    ({"exp_avg", "exp_avg_sq"}, {"momentum_buffer"}),  # AdamW, and Muon with AdamW beside it
    ({"state1", "state2"},),
    ({*FACTORS}, {"exp_avg_sq"}),
)
"""What each optimizer keeps of a parameter."""


def content_fault(checkpoint: Path) -> str | None:
    """An inconsistency in a checkpoint whose files are complete; None if there is none."""
    try:
        state = read(checkpoint / STATE, StateFile)
        if checkpoint.name != (name := f"step-{state.step:06d}"):
            return f"it holds the state of {name}"
        if state.step > state.steps:
            return f"it is at step {state.step} of a run of {state.steps}"
        if state.engine.global_steps != state.step:
            return f"its engine counts {counted(state.engine.global_steps, 'step')}, and its run {state.step}"
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
    moments = {kind: {name: reader.numel(kind, name) for name in reader.names(kind)} for kind in ELEMENTWISE}
    counts = {name: reader.numel("step", name) for name in reader.names("step")}
    if state.engine.global_steps == state.engine.skipped_steps and not any((*moments.values(), counts)):
        return None  # no step has been applied
    known: dict[str, set[str]] = {name: set() for name in weights}
    for kind in (*ELEMENTWISE, *FACTORS):
        for name in reader.names(kind):
            if name not in weights or (kind in ELEMENTWISE and moments[kind][name] != weights[name]):
                return f"its {kind} does not match its weights, at {name}"
            known[name].add(kind)
    possible = next((each for each in OF_OPTIMIZERS if any(known[name] == each[0] for name in known)), OF_OPTIMIZERS[0])
    for name in sorted(known):
        if known[name] not in possible:
            has = ", ".join(sorted(known[name])) or "no state"
            return f"its optimizer's state does not match its weights, at {name}: {has}"
    if counts != {name: 1 for name in weights if known[name] != {"momentum_buffer"}}:
        return "it does not count the steps of every weight"
    for name in counts:
        count = reader.whole("step", name).item()
        if not (0 <= count <= state.step and count == int(count)):
            return f"it counts {count:g} steps of {name}, and its run {state.step}"
    return None
