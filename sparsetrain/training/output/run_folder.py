"""Prepare the run folder, lock it, and write the record of how the run was produced.

``recipe.yaml`` (resolved), ``deepspeed.json``, ``environment.json``, ``history.json`` (of a run that was resumed with
changes), ``metrics.jsonl``, ``evaluation.json``, ``report.md``, ``report.html``, the pictures, ``checkpoints/`` and
``final/``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sparsetrain.durable import write_whole
from sparsetrain.errors import CheckpointError, RecipeError
from sparsetrain.evaluation.metrics import METRICS_FILE
from sparsetrain.evaluation.report import RESULTS_FILE, read_results
from sparsetrain.recipe import Recipe, dump_recipe, load_recipe
from sparsetrain.training import checkpoints
from sparsetrain.training.changes import HISTORY_FILE, Change, Resumption, changes
from sparsetrain.training.checkpoints.store import LATEST
from sparsetrain.training.output.folder_contents import LOCK_FILE, in_use, listed, of_a_run, refuse_inside, refuse_over

AFTER = ", after"
NEEDED_FILES = ("recipe.yaml", "environment.json", LOCK_FILE, f"checkpoints/{LATEST}")
"""Files that a run must be able to write."""
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "datasets", "tokenizers", "numpy", "wandb")


def prepare(folder: Path, recipe: Recipe, resumed: bool, ranks: int, cleanup: ExitStack) -> None:
    """Create the run folder, or check that it holds the run to be resumed, and lock it.

    Args:
        ranks: The number of ranks of this run.
        cleanup: Closing it releases the lock.

    Raises:
        CheckpointError: The folder holds another run, or one that cannot be resumed so; another process uses it; or it
            cannot be written.
    """
    try:
        refuse_inside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _check_kinds(folder)
        _lock_folder(folder, cleanup)
        if resumed:
            _check_resumed(folder, recipe, ranks)
            return
        refuse_over(folder, recipe)
        describe(folder, recipe)
    except OSError as error:
        where = "" if error.filename in (None, str(folder)) else f"{error.filename}: "
        raise CheckpointError(f"cannot write the run folder {folder}: {where}{error.strerror or error}") from error


def resume(folder: Path, checkpoint: Path, recipe: Recipe, *, balanced: bool = False) -> Resumption:
    """Compare the recipe with the one recorded in a checkpoint, and return the changes.

    Args:
        balanced: Whether the model's routers add a balance loss.

    Raises:
        CheckpointError: The recipe changes a setting that must not change.
    """
    before = checkpoints.recorded_recipe(checkpoint)
    return Resumption(before, _checked(folder, before, recipe, checkpoint.name, balanced=balanced))


def _checked(folder: Path, before: Recipe, after: Recipe, since: str, *, balanced: bool = False) -> list[Change]:
    recorded, refused = changes(before, after, balanced=balanced)
    if refused:
        raise CheckpointError(
            f"--resume continues the run in {folder}, but the recipe has changed since {since}:\n  "
            + "\n  ".join(refused)
            + "\nundo that, or start a new run with output=..."
        )
    return recorded


def refuse_to_start_over(folder: Path, skipped: Sequence[str]) -> None:
    """Refuse to start at step 0 if this would overwrite damaged checkpoints or a trained model.

    Raises:
        CheckpointError: It would; names them.
    """
    found = [name for name in of_a_run(folder) if name != METRICS_FILE]
    if RESULTS_FILE in found and not _is_evaluated(folder):
        # These were measured before the first checkpoint, and will be measured again.
        found.remove(RESULTS_FILE)
    if found:
        raise CheckpointError(
            f"there is no complete checkpoint in {folder} to resume from, and a run from step 0 would overwrite "
            f"{listed(found)}; move that away, or choose another folder with output=..."
            + "".join(f"\n  {line}" for line in skipped)
        )


def remake(folder: Path, recipe: Recipe, cleanup: ExitStack) -> None:
    """Create the run folder again after it was deleted during the run.

    Raises:
        CheckpointError: Another process has created it first.
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _lock_folder(folder, cleanup)
    describe(folder, recipe)


def label_at_end(recipe: Recipe) -> str:
    """The label of the trained model's results in ``evaluation.json``."""
    return f"{recipe.attention.method}{AFTER}"


@cache
def environment() -> dict[str, Any]:
    """Versions of Python and the main packages, and the git revision of the working directory."""
    packages: dict[str, str | None] = {}
    for name in ("sparsetrain", *PACKAGES):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), "packages": packages, "git_revision": _git_revision()}


def describe(folder: Path, recipe: Recipe, history: Sequence[dict[str, Any]] = ()) -> None:
    """Record how the run is produced: recipe, versions, and changes when it was resumed.

    Raises:
        OSError: The folder cannot be written.
    """
    write_whole(folder / "recipe.yaml", dump_recipe(recipe))
    write_whole(folder / "environment.json", json.dumps(environment(), indent=1))
    if history:
        write_whole(folder / HISTORY_FILE, json.dumps(list(history), indent=1))


def _check_resumed(folder: Path, recipe: Recipe, ranks: int) -> None:
    """Refuse changes of the recipe and of the ranks that can be detected before anything is loaded."""
    newest, skipped = checkpoints.newest(folder / "checkpoints")
    if newest is not None:
        before = resume(folder, newest, recipe).before
        checkpoints.check_start(newest, before, recipe, ranks)
        return
    refuse_to_start_over(folder, skipped)
    if METRICS_FILE in of_a_run(folder) and (folder / "recipe.yaml").is_file():
        try:
            before = load_recipe(folder / "recipe.yaml").recipe
        except RecipeError:
            return  # only a few lines of metrics could be lost
        _checked(folder, before, recipe, "it began")


def _is_evaluated(folder: Path) -> bool:
    """Whether the results in a folder are those of a completed run."""
    try:
        return any(label.endswith(AFTER) for label in read_results(folder))
    except (CheckpointError, OSError):
        return False


def _check_kinds(folder: Path) -> None:
    """Refuse a folder in place of a file to write, or a file in place of a folder: the first checkpoint would fail."""
    for name in NEEDED_FILES:
        place = folder / name
        if place.is_dir() and (name == LOCK_FILE or not place.is_symlink()):  # other links are replaced, not followed
            raise CheckpointError(f"{place} is a folder, but a run writes a file with that name; move it away")
    place = folder / "checkpoints"
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place} is not a folder, but a run keeps its checkpoints there; move it away")


def _lock_folder(folder: Path, cleanup: ExitStack) -> None:
    # Do not truncate it (it may be a link to another file), and do not block (it may be a pipe without a reader).
    number = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    lock = cleanup.enter_context(os.fdopen(number, "rb+", buffering=0))
    try:
        # A lock of the process: it is released when the process ends in any way, not when its last child does.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(in_use(folder)) from error
        # The file system does not support locks.


def _git_revision() -> str | None:
    try:
        # A repository's config may name a file monitor program; do not run it.
        describe = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]
        answer = subprocess.run(describe, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
