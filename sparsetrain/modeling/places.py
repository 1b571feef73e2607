"""Resolve the location of a model (local folder, Hub, or this package), and explain errors in reading it."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from sparsetrain.cache_folder import cache_fault
from sparsetrain.errors import ModelError
from sparsetrain.hub import read_cache_if_unreachable
from sparsetrain.modeling.boundary import words
from sparsetrain.recipe.local_model import OWN_MODELS, refuse_missing

ADAPTER_FILE = "adapter_config.json"
"""The files that peft writes into a folder of adapters."""

MODEL_FILES = ("config.json", ADAPTER_FILE)
"""A folder of a model or of adapters has one of these."""

HUB_ARGUMENTS = frozenset({"revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download"})
"""Arguments of ``from_pretrained`` that locate a checkpoint."""


def resolve(name: str, field: str) -> str:
    """Expand the path of a local folder; a Hub id is returned unchanged, and read from the cache where the Hub does not
    answer.

    Args:
        field: The name of the setting in error messages.

    Raises:
        ModelError: The folder does not exist, or is the folder of a run or of a run's checkpoint.
    """
    if name.startswith(OWN_MODELS):
        folder = Path(str(resources.files("sparsetrain"))) / "assets" / name.removeprefix(OWN_MODELS)
        if not (folder / "config.json").is_file():
            shipped = sorted(file.parent.name for file in folder.parent.glob("*/config.json"))
            raise ModelError(f"{field}={name!r}: no such model ships with sparsetrain; there is {shipped or 'none'}")
        return str(folder)
    refuse_missing(name, field)
    if os.path.isdir(place := os.path.expanduser(name)):
        folder = Path(place)
        _check_holds_model(folder, f"{field}={name!r}")
        check_files(folder)
        return str(folder)
    read_cache_if_unreachable()
    return name


def _check_holds_model(folder: Path, what: str) -> None:
    """Refuse a run folder or checkpoint folder where a model is expected."""
    if any((folder / file).is_file() for file in ("config.json", ADAPTER_FILE, "tokenizer_config.json")):
        return
    folder = folder.absolute()
    if (folder / "state.json").is_file() and (folder / "manifest.json").is_file():
        kind, run = "a checkpoint, from which a run resumes", folder.parent.parent
    elif folder.name == "checkpoints" and (folder.parent / "recipe.yaml").is_file():
        kind, run = "the folder of checkpoints, from which a run resumes", folder.parent
    elif (folder / "recipe.yaml").is_file():
        kind, run = "the folder of a run", folder
    else:
        return
    if (run / "final").is_dir():
        raise ModelError(
            f"{what} is {kind}; the model that the run trained is {run / 'final'} (sparsetrain export copies it)"
        )
    raise ModelError(
        f"{what} is {kind}, and holds no model: continue the run with --resume; at its end it writes {run / 'final'}"
    )


def check_files(folder: Path) -> None:
    """Refuse a folder with an entry that is neither a file nor a folder: reading a pipe would block for ever.

    Raises:
        ModelError: There is such an entry; names the first.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if not (entry.is_file() or entry.is_dir()):
            kind = "a broken link" if entry.is_symlink() and not entry.exists() else "not a regular file"
            raise ModelError(f"{entry} is {kind}")


def unloadable(field: str, name: str | None, error: BaseException) -> ModelError:
    """The error for a model or tokenizer that a library cannot read, with a fix."""
    if (fault := cache_fault(error)) is not None:
        return ModelError(f"{field}={name!r} cannot be loaded: {fault}")
    return ModelError(f"{field}={name!r} cannot be loaded: {words(error)} {remedy(field, name)}")


def remedy(field: str, name: str | None) -> str:
    """The fix to suggest when a model or tokenizer cannot be read."""
    if Path(str(name)).is_dir():
        needed = "its tokenizer" if "tokenizer" in field else "config.json, safetensors and a tokenizer"
        return f"The folder must hold {needed}, complete and readable."
    return (
        f"There is no folder {name} here. If it is a Hub id, check its spelling, that this machine can reach the Hub "
        f"(or download it first: hf download {name}), and that you are logged in if it is gated (hf auth login)."
    )
