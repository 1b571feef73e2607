"""The run folder: whose run it holds, and the record of what produced it.

``recipe.yaml`` (resolved), ``deepspeed.json``, ``environment.json``, ``history.json`` (of a run that was resumed with
changes), ``metrics.jsonl``, ``evaluation.json``, ``report.md``, the pictures, ``checkpoints/`` and ``final/``.
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

from sparsetrain.durable import read_bytes, write_whole
from sparsetrain.errors import CheckpointError, RecipeError
from sparsetrain.evaluation.report import RESULTS_FILE, read_results
from sparsetrain.recipe import Recipe, dump_recipe, load_recipe
from sparsetrain.training import checkpoints
from sparsetrain.training.changes import Change, Resumption, changes, describe_change
from sparsetrain.training.checkpoints.store import LATEST
from sparsetrain.training.output.folder_contents import LOCK_FILE, listed, of_a_run, refuse_inside, refuse_over
from sparsetrain.training.output.tracking import METRICS_FILE

HISTORY_FILE = "history.json"
"""What was changed when the run was resumed."""
AFTER = ", after"
NEEDED_FILES = ("recipe.yaml", "environment.json", LOCK_FILE, f"checkpoints/{LATEST}")
"""What a run cannot do without, beside folders."""
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "datasets", "tokenizers", "numpy", "wandb")


def prepare(folder: Path, recipe: Recipe, resumed: bool, occupied: ExitStack) -> None:
    """Make the run folder, or check that it holds the run to be resumed, and keep other processes out of it.

    Args:
        occupied: lets other processes in again when it is left.

    Raises:
        CheckpointError: it holds another run, another process is at work in it, or it cannot be written.
    """
    try:
        refuse_inside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _check_kinds(folder)
        _occupy(folder, occupied)
        if resumed:
            _check_resumed(folder, recipe)
            return
        refuse_over(folder, recipe)
        describe(folder, recipe)
    except OSError as error:
        where = "" if error.filename in (None, str(folder)) else f"{error.filename}: "
        raise CheckpointError(f"cannot write the run folder {folder}: {where}{error.strerror or error}") from error


def resume(folder: Path, checkpoint: Path, recipe: Recipe, *, balanced: bool = False) -> Resumption:
    """What the recipe changes in the run that wrote a checkpoint, as the checkpoint itself tells.

    Args:
        balanced: the model's routers add a balance loss.

    Raises:
        CheckpointError: it changes what must stay.
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
    """Refuse to begin at step 0 where checkpoints, which are damaged, or a trained model would be written over.

    Raises:
        CheckpointError: names them.
    """
    found = [name for name in of_a_run(folder) if name != METRICS_FILE]
    if RESULTS_FILE in found and not _is_evaluated(folder):
        # Measured before the first checkpoint, and measured again.
        found.remove(RESULTS_FILE)
    if found:
        raise CheckpointError(
            f"there is no whole checkpoint in {folder} to resume from, and a run from step 0 would write over "
            f"{listed(found)}; move that away, or choose another folder with output=..."
            + "".join(f"\n  {line}" for line in skipped)
        )


def remake(folder: Path, recipe: Recipe, occupied: ExitStack) -> None:
    """Make the folder again that was deleted under its run.

    Raises:
        CheckpointError: another process has made it before.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _occupy(folder, occupied)
    describe(folder, recipe)


def label_at_end(recipe: Recipe) -> str:
    """The name in ``evaluation.json`` of what the trained model reaches."""
    return f"{recipe.attention.method}{AFTER}"


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


def describe(folder: Path, recipe: Recipe, history: Sequence[dict[str, Any]] = ()) -> None:
    """Write down what produces the run: recipe, versions, and what was changed when it was resumed.

    Raises:
        OSError: the folder cannot be written.
    """
    write_whole(folder / "recipe.yaml", dump_recipe(recipe))
    write_whole(folder / "environment.json", json.dumps(environment(), indent=1))
    if history:
        write_whole(folder / HISTORY_FILE, json.dumps(list(history), indent=1))


def read_history(folder: Path) -> list[str]:
    """What was changed when the run in a folder was resumed, a line each; nothing where nothing readable says so."""
    try:
        return [describe_change(line) for line in json.loads(read_bytes(folder / HISTORY_FILE))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _check_resumed(folder: Path, recipe: Recipe) -> None:
    """Refuse what can be refused before anything is loaded."""
    newest, skipped = checkpoints.newest(folder / "checkpoints")
    if newest is not None:
        resume(folder, newest, recipe)
        return
    refuse_to_start_over(folder, skipped)
    if METRICS_FILE in of_a_run(folder) and (folder / "recipe.yaml").is_file():
        try:
            before = load_recipe(folder / "recipe.yaml").recipe
        except RecipeError:
            return  # there is nothing to lose but a few lines of metrics
        _checked(folder, before, recipe, "it began")


def _is_evaluated(folder: Path) -> bool:
    """Whether the results in a folder are those of a run that came to its end."""
    try:
        return any(label.endswith(AFTER) for label in read_results(folder))
    except (CheckpointError, OSError):
        return False


def _check_kinds(folder: Path) -> None:
    """Refuse a folder where a file is to be written, or a file where a folder is: the first checkpoint would fail."""
    for name in NEEDED_FILES:
        place = folder / name
        if place.is_dir() and (name == LOCK_FILE or not place.is_symlink()):  # other links are replaced, not followed
            raise CheckpointError(f"{place} is a folder, and a run writes a file of that name; move it away")
    place = folder / "checkpoints"
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place} is no folder, and a run keeps its checkpoints in one; move it away")


def _occupy(folder: Path, occupied: ExitStack) -> None:
    # Neither emptied, which a link would lead elsewhere, nor waited for, as a pipe without a reader is.
    number = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    lock = occupied.enter_context(os.fdopen(number, "rb+", buffering=0))
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


def _git_revision() -> str | None:
    try:
        # A repository may name a program that watches its files; none is run for a version.
        describe = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]
        answer = subprocess.run(describe, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
