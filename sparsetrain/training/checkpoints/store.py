"""The folder of checkpoints: find complete ones, commit a new one, delete old ones.

``step-000120/`` holds ``rank-*.safetensors`` (see :mod:`.files`), ``rank-*.json`` (random state; size and checksum of
the former), ``state.json``, the resolved recipe, and ``manifest.json`` with the size and CRC-32 of every file. It is
written as ``step-000120.tmp``, flushed, and renamed. The manifest is written last, so a folder whose files match it is
complete. ``latest`` names the newest checkpoint and is replaced last of all; ``best.json`` names the one with the best
evaluation.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsetrain.activity import activity
from sparsetrain.durable import flush, read_bytes, remove_path
from sparsetrain.errors import CheckpointError
from sparsetrain.training.checkpoints.content import content_fault
from sparsetrain.training.checkpoints.files import checksum_of, write_text
from sparsetrain.training.checkpoints.manifest import rank_file, read_manifest, unlisted, write_manifest
from sparsetrain.world import World

LATEST = "latest"
BEST = "best.json"


def target_of(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"step-{step:06d}"


def partial_of(folder: Path, step: int) -> Path:
    """The folder in which a checkpoint is written before it is complete."""
    return folder / f"step-{step:06d}.tmp"


def make_partial(partial: Path) -> None:
    """Create an empty folder for writing a checkpoint."""
    remove_path(partial)
    partial.mkdir(parents=True)


def commit(partial: Path, target: Path, texts: dict[str, str], ranks: int) -> None:
    """Complete a checkpoint whose ranks have all written their files, and move ``latest`` to it.

    Raises:
        OSError: It cannot be written; nothing has changed.
        CheckpointError: The file of a rank is missing.
    """
    if not partial.is_dir():
        raise CheckpointError(f"{partial} was removed while it was being written")
    files: dict[str, dict[str, Any]] = {}
    for rank in range(ranks):
        record = rank_file(partial, rank, "json")
        if not record.is_file():
            raise CheckpointError(
                f"rank 0 does not see the files of rank {rank}; output must be a folder shared by all nodes"
            )
        files[rank_file(partial, rank, "safetensors").name] = json.loads(record.read_text())["file"]
        files[record.name] = {"bytes": record.stat().st_size, "crc32": checksum_of(record)}
    for name, text in texts.items():
        files[name] = write_text(partial / name, text)
    write_manifest(partial, files)
    flush(partial)
    # An existing entry was skipped by --resume, even if it looks complete; it need not be a folder.
    remove_path(target)
    os.replace(partial, target)
    flush(target.parent)
    write_text(target.parent / LATEST, f"{target.name}\n")
    flush(target.parent)


def prune(newest: Path, keep_last: int) -> None:
    """Delete checkpoints older than those to keep, and the remains of interrupted saves and deletions.

    Args:
        newest: The last checkpoint of this run. Those of later steps were skipped by ``--resume``: they do not count
            among the ones to keep, and stay until the run reaches their step again.
    """
    folder = newest.parent
    found = [path for path in _checkpoints(folder) if _step_of(path) <= _step_of(newest)]
    whole = [path for path in found if fault(path) is None]
    best = read_best(folder)
    spared = None if best is None else best["checkpoint"]
    # Delete nothing if the newest cannot be read back: the storage may be faulty.
    before = found.index(whole[-keep_last:][0]) if whole and whole[-1] == newest else 0
    old = [path for path in found[:before] if path.name != spared]
    for path in (*old, *folder.glob("step-*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def read_best(folder: Path) -> dict[str, Any] | None:
    """``best.json``: ``checkpoint``, ``metric`` and ``value``; None if there is no complete best checkpoint."""
    try:
        best = json.loads(read_bytes(folder / BEST))
        best = {"checkpoint": best["checkpoint"], "metric": best["metric"], "value": float(best["value"])}
        named = re.fullmatch(r"step-\d+", best["checkpoint"]) is not None
        sound = named and math.isfinite(best["value"]) and fault(folder / best["checkpoint"]) is None
        return best if sound else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def write_best(folder: Path, best: dict[str, Any]) -> None:
    """Replace ``best.json``."""
    write_text(folder / BEST, json.dumps(best, indent=1))


def find(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and a line for each newer one that was skipped. Called by every rank.

    The ranks divide the work of computing checksums, and all must see the files.
    """
    skipped: list[str] = []
    while True:
        found: list[Any] = [None]
        if world.main:
            found[0] = newest(folder, skipped)
        dist.broadcast_object_list(found, src=0)
        candidate, skipped = found[0]
        if candidate is None:
            return None, skipped
        faults: list[Any] = [None] * world.size
        dist.all_gather_object(faults, _damage(candidate, world))
        damage = next((each for each in faults if each), None)
        if damage is None:
            return candidate, skipped
        skipped.append(f"skipping {candidate.name}: {damage}")


def fault(checkpoint: Path) -> str | None:
    """The reason why a checkpoint is incomplete, without reading its tensors; None if it is complete."""
    try:
        manifest = read_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return f"no readable manifest ({error})"
    for name, entry in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{name} has {path.stat().st_size:,} bytes instead of {entry.bytes:,}"
    try:
        left_out = unlisted(checkpoint, manifest)
    except (OSError, ValueError) as error:
        return f"state.json cannot be read ({error})"
    return None if left_out is None else f"its manifest does not list {left_out}"


def newest(folder: Path, skipped: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that looks complete (tensors are not read), and a line for each newer one that does not.

    Args:
        skipped: Lines about checkpoints to skip in any case; they come first.
    """
    lines = list(skipped)
    reported = {line.split(":")[0] for line in lines}
    for candidate in reversed(_checkpoints(folder)):
        if f"skipping {candidate.name}" in reported:
            continue
        found = fault(candidate) or content_fault(candidate)
        if found is None:
            return candidate, lines
        lines.append(f"skipping {candidate.name}: {found}")
    return None, lines


def _damage(checkpoint: Path, world: World) -> str | None:
    """The fault in the files that this rank checks; None if there is none."""
    try:
        manifest = read_manifest(checkpoint)
        for index, (name, entry) in enumerate(sorted(manifest.items())):
            if index % world.size == world.rank and checksum_of(checkpoint / name, activity.moved) != entry.crc32:
                return f"{name} is not what was written (its CRC-32 differs)"
    except (OSError, ValueError) as error:
        return f"rank {world.rank} cannot read it ({error})"
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, complete or not, the oldest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
