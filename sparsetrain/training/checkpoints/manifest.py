"""``manifest.json``: size and CRC-32 of every file of a checkpoint. It is written last, so what it lists was there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsetrain.training.checkpoints.files import write_text

MANIFEST = "manifest.json"
STATE = "state.json"

Entry = dict[str, Any]
"""What is known of a file: ``bytes`` and ``crc32``."""


def rank_file(checkpoint: Path, rank: int, suffix: str) -> Path:
    """A file of one rank; ``suffix`` is ``safetensors`` or ``json``."""
    return checkpoint / f"rank-{rank:05d}.{suffix}"


def write_manifest(checkpoint: Path, files: dict[str, Entry]) -> None:
    """Say what a checkpoint consists of."""
    write_text(checkpoint / MANIFEST, json.dumps(files, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, Entry]:
    """The files of a checkpoint, by name.

    Raises:
        OSError, ValueError: there is no manifest.
    """
    files = json.loads((checkpoint / MANIFEST).read_text())
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise ValueError("it does not hold the size and CRC-32 of files")
    if strange := [name for name in files if "/" in name or len(name) > 100]:
        raise ValueError(f"it lists {strange[0]!r:.40}, which is no file of a checkpoint")
    return files


def unlisted(checkpoint: Path, files: dict[str, Entry]) -> str | None:
    """A file that the checkpoint must have and its manifest leaves out, whose bytes nobody would compare."""
    if STATE not in files:
        return STATE
    ranks = range(_ranks(checkpoint))
    wanted = (rank_file(checkpoint, rank, suffix).name for rank in ranks for suffix in ("safetensors", "json"))
    return next((name for name in wanted if name not in files), None)


def tensor_files(checkpoint: Path) -> list[Path]:
    """Where the ranks that wrote a checkpoint put their tensors. Whatever else lies there is none of it.

    Raises:
        OSError, ValueError: ``state.json`` does not say how many they were.
    """
    return [rank_file(checkpoint, rank, "safetensors") for rank in range(_ranks(checkpoint))]


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("crc32"), str)


def _ranks(checkpoint: Path) -> int:
    state = json.loads((checkpoint / STATE).read_text())
    ranks = state.get("ranks") if isinstance(state, dict) else None
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"{STATE} does not say how many ranks wrote it")
    return ranks
