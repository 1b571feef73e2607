"""Find the files with the weights of a checkpoint: one safetensors file, or the shards that an index lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sparsetrain.errors import ModelError
from sparsetrain.modeling.boundary import explained
from sparsetrain.modeling.side_files import read_object

WEIGHTS_FIELD = "transformers_weights"
"""The config field that names the weights file."""


def locate(path: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    """The local path of a checkpoint's file, downloaded from the Hub if needed; None if it does not exist."""
    quiet = dict.fromkeys((f"_raise_exceptions_for_{what}" for what in ("missing_entries", "connection_errors")), False)
    found = cached_file(path, file, **quiet, **hub)
    return None if found is None else Path(found)


def weight_files(
    path: str, hub: Mapping[str, Any], weights: object = None, variant: str | None = None
) -> list[str] | None:
    """The names of the safetensors files from which transformers reads the weights of a checkpoint.

    Args:
        path: A folder or a Hub id.
        hub: Where to find the files (``revision``, ``subfolder``, ...).
        weights: The config's ``transformers_weights``, if it has this field.
        variant: The ``variant`` argument of transformers.

    Returns:
        The file names; None if there is neither such a file nor an index.

    Raises:
        ModelError: The index is damaged, or points to anything but safetensors files within the checkpoint.
    """
    infix = "" if variant is None else f".{variant}"
    whole, index = (
        name.removesuffix(ending) + infix + ending
        for name, ending in ((SAFE_WEIGHTS_NAME, ".safetensors"), (SAFE_WEIGHTS_INDEX_NAME, ".json"))
    )
    if weights is not None:
        if not isinstance(weights, str) or not (
            _is_inside(weights) and weights.endswith((".safetensors", ".index.json"))
        ):
            raise ModelError(f"config.json of {path}: {WEIGHTS_FIELD}={weights!r:.100} names no safetensors file in it")
        if weights.endswith(".safetensors"):
            return [weights]
        index = weights
    elif locate(path, whole, hub) is not None:
        return [whole]
    file = locate(path, index, hub)
    return None if file is None else sorted(set(_read_index(file, f"{index} of {path}").values()))


def _read_index(file: Path, what: str) -> dict[str, str]:
    """Read an index: a mapping from each tensor's name to its file."""
    content = read_object(file)
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{what} has no weight_map, the mapping from tensors to files")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or not (_is_inside(shard) and shard.endswith(".safetensors")):
            raise ModelError(
                f"{what} maps {tensor:.100} to {shard!r:.100}, which is not a safetensors file in it; nothing else is "
                "read (a pickle may run code)"
            )
    if not isinstance(about := content.get("metadata"), dict):
        raise ModelError(f"{what}: metadata={about!r:.60}, but transformers expects a mapping")
    return shards


def stored_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """The shapes of the tensors in safetensors files, by name; only the headers are read."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        with explained(f"{file} cannot be read"), safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    return shapes


def _is_inside(file: str) -> bool:
    parts = PurePosixPath(file)
    return not parts.is_absolute() and ".." not in parts.parts and "\\" not in file
