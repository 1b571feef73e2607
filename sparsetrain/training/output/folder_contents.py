"""Inspect the folder that a run will write to, and refuse to overwrite checkpoints, results, models or other files.

It does not import torch, so that a used folder is refused before the libraries are loaded.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from pathlib import Path

from sparsetrain.durable import folder_fault
from sparsetrain.errors import CheckpointError, RecipeError
from sparsetrain.evaluation.base import PICTURES_OF_A_RUN
from sparsetrain.recipe import Recipe, dump_recipe, load_recipe
from sparsetrain.recipe.mistaken import is_recipe_instead

LOCK_FILE = ".lock"
"""The file that is locked while a process trains in the folder. It is not deleted."""
MODEL_FILES = re.compile(r"config\.json|adapter_config\.json|.*\.(safetensors|bin|pt|pth|gguf)")
OF_A_RUN = ("final", "evaluation.json", "metrics.jsonl")
"""Valuable results of a run besides its checkpoints."""
WRITTEN = (
    *("recipe.yaml", "environment.json", "deepspeed.json", "history.json", "nonfinite.jsonl", "report.md"),
    *("report.html", "selection.npz"),
    *(f"{name}.png" for name in PICTURES_OF_A_RUN),
)
"""Files that a run would overwrite, besides the pictures of its evaluation tasks."""
UNFINISHED = re.compile(r".*\.(tmp|part|partial)")
"""Remains of interrupted processes, which are written again."""
PARTIAL = ".partial"
"""The subfolder in which an export is written until it is complete. The target folder itself may be a mount."""
MARK = ".sparsetrain-export"
"""The first file written there. It marks the remains of an interrupted export, which may be removed."""


def output_folder(recipe: Recipe) -> Path:
    """The run folder of a recipe: its ``output``, or a folder with the recipe's name."""
    return Path(recipe.output or f"runs/{recipe.name}")


def refuse_early(folder: Path, recipe: Recipe, resumed: bool) -> None:
    """Call :func:`refuse_inside` and :func:`refuse_over` before anything is loaded or locked, and try to write.

    Another process in the folder is reported later, when it is locked, to one rank of several, which may be rank 0 of
    the same run.

    Raises:
        CheckpointError: The folder is refused; names what it holds, the run that it belongs to, or why nothing can be
            written in it.
    """
    with contextlib.suppress(OSError):
        refuse_inside(folder)
        if not is_locked(folder):
            if not resumed:
                refuse_over(folder, recipe)
        elif "RANK" not in os.environ:
            raise CheckpointError(in_use(folder))
    if (fault := folder_fault(folder)) is not None:
        raise CheckpointError(f"cannot write the run folder {folder}: {fault}; choose another folder with output=...")


def check_finished(run: Path, out: Path) -> None:
    """Refuse to export a folder that is not of a finished run, to a format that there is none for, or to a place where
    no new folder can be filled.

    Args:
        out: What the export is to be.

    Raises:
        CheckpointError: Names what is wrong.
    """
    if out.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{out}: there is no export to GGUF: llama.cpp, which reads it, attends to every key, so the model would "
            "run without its attention method, and has no place for weights that a method adds; name a folder"
        )
    if not (run / "recipe.yaml").is_file():
        if (advice := is_recipe_instead(str(run))) is not None:
            raise CheckpointError(advice)
        raise CheckpointError(f"{run} is not a run folder (it has no recipe.yaml); give the folder that holds final/")
    if not (run / "final").is_dir():
        raise CheckpointError(
            f"{run} has no final/: the run has not finished, or checkpoint.export was off; continue it with --resume"
        )
    _check_place(run, out)


def in_use(folder: Path) -> str:
    """What to say of a folder that another process has locked."""
    return (
        f"another process uses {folder}; wait for its end, or choose another folder with output=... "
        "(if these are ranks of one run, their launcher did not set RANK and WORLD_SIZE)"
    )


def refuse_inside(folder: Path) -> None:
    """Refuse a folder within the checkpoints or the model of another run.

    Raises:
        CheckpointError: It is within one; names that run.
    """
    if (part := enclosing_run(folder)) is not None:
        raise CheckpointError(f"{folder} lies in {part}, which belongs to another run; choose another output=...")


def refuse_over(folder: Path, recipe: Recipe) -> None:
    """Refuse to start a run in a folder with files that would be overwritten.

    These are checkpoints, results and models, whatever records are beside them, and files that are not of a run.

    Raises:
        CheckpointError: There are such files; names them.
    """
    if found := of_a_run(folder):
        raise CheckpointError(
            f"{folder} already holds a run; continue it with --resume, or choose another folder with output=... "
            f"(it holds {listed(found)})"
        )
    if found := of_others(folder, recipe):
        raise CheckpointError(
            f"{folder} holds {listed(found)}, which this run would overwrite; move that away, or choose another "
            "folder with output=..."
        )


def of_a_run(folder: Path) -> list[str]:
    """Checkpoints, results and models of an earlier run in a folder, as names relative to it."""
    checkpoints = (path for path in _entries(folder / "checkpoints") if re.fullmatch(r"step-\d+", path.name))
    found = [f"checkpoints/{path.name}" for path in checkpoints if _holds_anything(path)]
    found += [name for name in OF_A_RUN if _holds_anything(folder / name)]
    for path in _entries(folder):
        if MODEL_FILES.fullmatch(path.name) or (
            path.name not in OF_A_RUN
            and not UNFINISHED.fullmatch(path.name)
            and any(MODEL_FILES.fullmatch(below.name) for below in _entries(path))
        ):
            found.append(path.name)
    return found


def of_others(folder: Path, recipe: Recipe) -> list[str]:
    """Files that a run would overwrite and that no unstarted run has left, as names relative to the folder."""
    drawn = [f"{name}.png" for name, task in recipe.eval.by_name.items() if task.result.wide]
    found = [name for name in (*WRITTEN, *drawn) if _holds_anything(folder / name)]
    if _is_resolved(folder / "recipe.yaml"):
        found = [name for name in found if name not in ("recipe.yaml", "environment.json", "deepspeed.json")]
    return found


def enclosing_run(folder: Path) -> Path | None:
    """The subfolder of another run (checkpoints or model) that contains ``folder``; None if there is none."""
    place = folder.resolve()
    for above in place.parents:
        for part in (above / "checkpoints", above / "final"):
            if place.is_relative_to(part) and (above / "recipe.yaml").is_file():
                return part
    return None


def listed(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_locked(folder: Path) -> bool:
    """Whether another process uses a folder. Not to be called by the process that holds the lock: it would lose it."""
    try:
        number = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(number)
    return False


def _check_place(run: Path, out: Path) -> None:
    for folder in (run / "final", run / "checkpoints"):
        if out.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{out} lies in {folder}, which belongs to the run; give a folder outside of it")
    if out.exists() and (not out.is_dir() or any(path.name != PARTIAL for path in out.iterdir())):
        raise CheckpointError(f"{out} exists already and is not an empty folder; give another name")
    partial = out / PARTIAL
    empty = partial.is_dir() and not any(partial.iterdir())
    if partial.is_symlink() or (partial.exists() and not empty and not (partial / MARK).is_file()):
        raise CheckpointError(f"{partial} was not left by an export; move it away, or give another name")
    if (fault := folder_fault(out)) is not None:
        raise CheckpointError(f"cannot write {out}: {fault}; give a folder that can be written")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _holds_anything(path: Path) -> bool:
    try:
        return bool(_entries(path)) if path.is_dir() else os.stat(path).st_size > 0
    except OSError:
        return False


def _is_resolved(file: Path) -> bool:
    """Whether a recipe file was written by a run; a file written by hand differs at least in its comments."""
    try:
        return file.is_file() and dump_recipe(load_recipe(file).recipe) == file.read_text(encoding="utf-8")
    except (RecipeError, OSError, ValueError):
        return False
