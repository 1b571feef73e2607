"""The run folder: whose run it holds, and the record of what produced it.

``recipe.yaml`` (resolved), ``deepspeed.json``, ``environment.json``, ``metrics.jsonl``, ``evaluation.json``,
``report.md``, the pictures, ``checkpoints/`` and ``final/``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import platform
import subprocess
from contextlib import ExitStack
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sparsetrain.durable import write_whole
from sparsetrain.errors import CheckpointError, RecipeError, first_line
from sparsetrain.recipe import Recipe, dump_recipe, load_recipe
from sparsetrain.training.tracking import METRICS_FILE

# What a resumed run may change: nothing that decides which weights come out.
FREE_TO_CHANGE = ("name", "output", "eval", "checkpoint", "wandb", "train.log_every")
# Nor what decides them by rounding alone, as other devices need: how the batch is cut and where things are kept.
ROUNDING_ALONE = (
    "deepspeed",
    "sequence.parallel",
    "train.micro_batch",
    "train.global_batch",  # said another way, or said at last: its rows are compared with those of the checkpoint
    "train.activation_checkpointing",
    "train.offload_activations",
    "train.mlp_chunk",
    "train.loss_chunk",
    "train.liger",
)
LOCK_FILE = ".lock"
"""Locked while a process trains in the folder. It stays there."""
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "datasets", "tokenizers", "numpy", "wandb")


def prepare(folder: Path, recipe: Recipe, resume: bool, occupied: ExitStack) -> None:
    """Make the run folder, or check that it holds the run to be resumed, and keep other processes out of it.

    Args:
        occupied: lets them in again when it is left.

    Raises:
        CheckpointError: it holds another run, another process is at work in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _occupy(folder, occupied)
        if (record := _record(folder)) is not None:
            if not resume:
                raise CheckpointError(
                    f"{folder} already holds a run; continue it with --resume, or choose another folder with output=..."
                )
            _check_same_run(record, recipe)
        _describe(folder, recipe)
    except OSError as error:
        raise CheckpointError(f"cannot write the run folder {folder}: {error.strerror or error}") from error


def remake(folder: Path, recipe: Recipe, occupied: ExitStack) -> None:
    """Make the folder again that was deleted under its run.

    Raises:
        CheckpointError: another process has made it before.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _occupy(folder, occupied)
    _describe(folder, recipe)


def label_at_end(recipe: Recipe) -> str:
    """The name in ``evaluation.json`` of what the trained model reaches."""
    return f"{recipe.attention.method}, after"


@cache
def environment() -> dict[str, Any]:
    """Versions of Python and the packages that matter, and the git revision of the working directory."""
    packages: dict[str, str | None] = {}
    for name in ("sparsetrain", *PACKAGES):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), "packages": packages, "git_revision": _git_revision()}


def _record(folder: Path) -> Path | None:
    """What says which recipe the run in a folder follows; None where no run has begun."""
    record = folder / "recipe.yaml"
    if record.exists():
        # Without metrics it was refused or interrupted before its first step, and there is nothing to lose.
        return record if (folder / METRICS_FILE).exists() else None
    return max((folder / "checkpoints").glob("step-*/recipe.yaml"), default=None)


def _describe(folder: Path, recipe: Recipe) -> None:
    write_whole(folder / "recipe.yaml", dump_recipe(recipe))
    write_whole(folder / "environment.json", json.dumps(environment(), indent=1))


def _occupy(folder: Path, occupied: ExitStack) -> None:
    lock = occupied.enter_context((folder / LOCK_FILE).open("w"))
    try:
        # Of the process, so that it ends with it however it is killed, and not with the last of its children.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(
                f"another process is at work in {folder}; wait for its end, or choose another folder with output=... "
                "(if these are the ranks of one run, their launcher does not tell them so)"
            ) from error
        # A file system that knows no locks.


def _check_same_run(record: Path, recipe: Recipe) -> None:
    try:
        before = _flat(load_recipe(record).recipe.model_dump(mode="json"))
    except RecipeError as error:
        raise CheckpointError(
            f"{record}, which says what recipe this run follows, is damaged ({first_line(error)}); every checkpoint "
            "holds a copy: put the newest in its place"
        ) from error
    after = _flat(recipe.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith((*FREE_TO_CHANGE, *ROUNDING_ALONE))
    ]
    if changed:
        raise CheckpointError(
            f"--resume continues the run in {record.parent}, but the recipe has changed:\n  "
            + "\n  ".join(changed)
            + "\nundo the change, or start a new run with output=..."
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {key: leaf for name, value in tree.items() for key, leaf in _flat(value, f"{path}{name}.").items()}
    if isinstance(tree, list) and tree:
        return {key: leaf for i, value in enumerate(tree) for key, leaf in _flat(value, f"{path}{i}.").items()}
    return {path.rstrip("."): tree}


def _git_revision() -> str | None:
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
