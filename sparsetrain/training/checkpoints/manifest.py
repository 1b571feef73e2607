"""``manifest.json``: size and CRC-32 of every file of a checkpoint. It is written last, so what it lists was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsetrain.training.checkpoints.files import write_text
from sparsetrain.training.checkpoints.schema import Entry, Manifest, StateFile, read

MANIFEST = "manifest.json"
STATE = "state.json"
RECIPE = "recipe.yaml"


def rank_file(checkpoint: Path, rank: int, suffix: str) -> Path:
    """A file of one rank; ``suffix`` is ``safetensors`` or ``json``."""
    return checkpoint / f"rank-{rank:05d}.{suffix}"


def write_manifest(checkpoint: Path, files: dict[str, dict[str, Any]]) -> None:
    """Say what a checkpoint consists of: ``bytes`` and ``crc32`` by file."""
    write_text(checkpoint / MANIFEST, json.dumps(files, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, Entry]:
    """The files of a checkpoint, by name.

    Raises:
        OSError, ValueError: there is no manifest.
    """
    return read(checkpoint / MANIFEST, Manifest).root


def unlisted(checkpoint: Path, files: dict[str, Entry]) -> str | None:
    """A file that the checkpoint must have and its manifest leaves out, whose bytes nobody would compare.

    Raises:
        OSError, ValueError: ``state.json`` does not say how many ranks wrote it.
    """
    if lacking := [name for name in (STATE, RECIPE) if name not in files]:
        return lacking[0]
    ranks = range(read(checkpoint / STATE, StateFile).ranks)
    wanted = (rank_file(checkpoint, rank, suffix).name for rank in ranks for suffix in ("safetensors", "json"))
    return next((name for name in wanted if name not in files), None)


def tensor_files(checkpoint: Path) -> list[Path]:
    """Where the ranks that wrote a checkpoint put their tensors. Whatever else lies there is none of it.

    Raises:
        OSError, ValueError: ``state.json`` does not say how many they were.
    """
    ranks = range(read(checkpoint / STATE, StateFile).ranks)
    return [rank_file(checkpoint, rank, "safetensors") for rank in ranks]
