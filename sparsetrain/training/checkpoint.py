"""Checkpoints that are complete or absent: written to a temporary folder, flushed, described, then renamed.

A checkpoint folder ``step-000120`` holds DeepSpeed's shards of what is trained (``engine/``), one RNG file per rank,
``state.json`` (step, tokens, data position, W&B run), the resolved recipe, and ``manifest.json`` with the size of every
file. The manifest is written last, so a folder whose files match it survived whatever interrupted the run.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sparsetrain.errors import CheckpointError
from sparsetrain.training.engine import World

MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """What a run knows about itself beyond the engine: JSON-able and the same on every rank."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, counted without padding (there is none)."""
    ranks: int = 1
    """Ranks of the run that wrote it."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position in the stream of training rows."""
    wandb_run_id: str | None = None


def save(engine: Any, folder: Path, state: TrainState, documents: dict[str, str], keep_last: int, world: World) -> Path:
    """Write checkpoint ``folder/step-NNNNNN`` and prune old ones.

    Args:
        documents: small text files to put beside the state (``recipe.yaml``, ``environment.json``).
        keep_last: complete checkpoints to keep.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / f"step-{state.step:06d}"
    partial = target.with_suffix(".tmp")
    if world.main:
        _explained(partial, lambda: _fresh(partial))
    dist.barrier()
    _explained(partial, lambda: _write_shards(engine, partial, world))
    dist.barrier()
    if world.main:
        _explained(partial, lambda: _seal(partial, target, state, documents))
        _prune(folder, keep_last)
    dist.barrier()
    return target


def load(engine: Any, checkpoint: Path, world: World) -> TrainState:
    """Restore the engine and the RNGs from a complete checkpoint.

    Raises:
        CheckpointError: it was written by another number of ranks, or cannot be read.
    """
    try:
        return _load(engine, checkpoint, world)
    except CheckpointError:
        raise
    except Exception as error:  # torch and pickle report damage by whatever exception the bytes happen to cause
        raise CheckpointError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}); if it is damaged, delete it, and --resume "
            "takes the one before it"
        ) from error


def _load(engine: Any, checkpoint: Path, world: World) -> TrainState:
    state = TrainState(**json.loads((checkpoint / "state.json").read_text()))
    if state.ranks != world.size:
        raise CheckpointError(
            f"{checkpoint} was written by {state.ranks} ranks and this run has {world.size}; resume with "
            f"{state.ranks} (deepspeed --num_gpus {state.ranks} ...)"
        )
    path, _ = engine.load_checkpoint(str(checkpoint), tag="engine")
    if path is None:
        raise CheckpointError(f"DeepSpeed found no engine state in {checkpoint}")
    _restore_rng(torch.load(checkpoint / f"rng-rank{world.rank}.pt", weights_only=False))
    return state


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and one line for each newer one that was passed over."""
    skipped: list[str] = []
    for candidate in sorted(_checkpoints(folder), reverse=True):
        fault = _fault(candidate)
        if fault is None:
            return candidate, skipped
        skipped.append(f"skipping {candidate.name}: {fault}")
    return None, skipped


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable manifest ({error})"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_shards(engine: Any, partial: Path, world: World) -> None:
    # What is frozen is in the model's own files: a checkpoint of adapters is as small as they are.
    engine.save_checkpoint(str(partial), tag="engine", save_latest=False, exclude_frozen_parameters=True)
    torch.save(_rng_state(), partial / f"rng-rank{world.rank}.pt")


def _seal(partial: Path, target: Path, state: TrainState, documents: dict[str, str]) -> None:
    (partial / "state.json").write_text(json.dumps(asdict(state)))
    for name, text in documents.items():
        (partial / name).write_text(text)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    (partial / MANIFEST).write_text(json.dumps(sizes, indent=1))
    _flush(partial / MANIFEST)
    _flush(partial)
    if target.exists() and _fault(target) is None:
        # A run resumed at this step saves it again; what stands is the same, and replacing it could lose both.
        shutil.rmtree(partial)
        return
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _flush(target.parent)


def _prune(folder: Path, keep_last: int) -> None:
    """Delete what lies before the checkpoints to keep, and what interrupted saves and deletions left behind."""
    kept = [path for path in sorted(_checkpoints(folder)) if _fault(path) is None][-keep_last:]
    old = [path for path in _checkpoints(folder) if path < kept[0]]
    for path in (*old, *folder.glob("step-*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """fsync a file or a folder: a rename must not outrun the bytes it announces."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(partial: Path, write: Any) -> None:
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    try:
        write()
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {partial.with_suffix('')}: {error}; earlier checkpoints are untouched. Free some "
            "space or make the folder writable, then continue with --resume"
        ) from error


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
