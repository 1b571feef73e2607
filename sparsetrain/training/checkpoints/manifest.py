"""``manifest.json``: size and CRC-32 of every file of a checkpoint. It is written last, after all files it lists."""

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
    """Write the manifest of a checkpoint: ``bytes`` and ``crc32`` by file."""
    write_text(checkpoint / MANIFEST, json.dumps(files, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, Entry]:
    """The files that a checkpoint's manifest lists, by name.

    Raises:
        OSError, ValueError: There is no valid manifest.
    """
    return read(checkpoint / MANIFEST, Manifest).root


def unlisted(checkpoint: Path, files: dict[str, Entry]) -> str | None:
    """A required file of the checkpoint that the manifest does not list, so that its checksum is unknown; else None.

    Raises:
        OSError, ValueError: ``state.json`` does not give the number of ranks that wrote the checkpoint.
    """
    if lacking := [name for name in (STATE, RECIPE) if name not in files]:
        return lacking[0]
    ranks = range(read(checkpoint / STATE, StateFile).ranks)
    wanted = (rank_file(checkpoint, rank, suffix).name for rank in ranks for suffix in ("safetensors", "json"))
    return next((name for name in wanted if name not in files), None)


def tensor_files(checkpoint: Path) -> list[Path]:
    """The tensor files of a checkpoint, one for each rank that wrote it. Other files in the folder are ignored.

    Raises:
        OSError, ValueError: ``state.json`` does not give the number of ranks.
    """
    ranks = range(read(checkpoint / STATE, StateFile).ranks)
    return [rank_file(checkpoint, rank, "safetensors") for rank in ranks]
