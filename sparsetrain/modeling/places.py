"""Where a model lies: a local folder, the Hub, or this package; and what to say where it cannot be read."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from sparsetrain.cache_folder import cache_fault
from sparsetrain.errors import ModelError
from sparsetrain.modeling.boundary import words

OWN_MODELS = "sparsetrain:"
"""Prefix of the checkpoints that ship with the package."""

ADAPTER_FILE = "adapter_config.json"
"""What peft writes into a folder of adapters."""

HUB_ARGUMENTS = frozenset({"revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download"})
"""Arguments of ``from_pretrained`` that say where a checkpoint lies."""


def resolve(name: str, field: str) -> str:
    """A local folder as a path, a Hub id as it is.

    Args:
        field: what to call it in an error.

    Raises:
        ModelError: it is a path, and there is no such folder, or it is that of a run or of a checkpoint in one.
    """
    if name.startswith(OWN_MODELS):
        folder = Path(str(resources.files("sparsetrain"))) / "assets" / name.removeprefix(OWN_MODELS)
        if not folder.is_dir():
            shipped = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
            raise ModelError(f"{field}={name!r}: no such model ships with sparsetrain; there is {shipped or 'none'}")
        return str(folder)
    # os.path, where pathlib raises for names of no user and for those that no file can have.
    place = os.path.expanduser(name)
    if name and os.path.isdir(place):
        folder = Path(place)
        _check_holds_model(folder, f"{field}={name!r}")
        check_files(folder)
        return str(folder)
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.path.exists(place):
        raise ModelError(f"{field}={name!r}: there is no such folder")
    return name


def _check_holds_model(folder: Path, what: str) -> None:
    """Refuse a folder of a run in the place of the model that lies in it."""
    if any((folder / file).is_file() for file in ("config.json", ADAPTER_FILE, "tokenizer_config.json")):
        return
    folder = folder.absolute()
    if (folder / "state.json").is_file() and (folder / "manifest.json").is_file():
        kind, run = "a checkpoint, from which a run goes on", folder.parent.parent
    elif folder.name == "checkpoints" and (folder.parent / "recipe.yaml").is_file():
        kind, run = "the folder of checkpoints, from which a run goes on", folder.parent
    elif (folder / "recipe.yaml").is_file():
        kind, run = "the folder of a run", folder
    else:
        return
    if (run / "final").is_dir():
        raise ModelError(
            f"{what} is {kind}; the model that it trained is {run / 'final'} (sparsetrain export copies it)"
        )
    raise ModelError(
        f"{what} is {kind}, and holds no model: continue the run with --resume, its end writes {run / 'final'}"
    )


def check_files(folder: Path) -> None:
    """Refuse a folder with something in it that is neither a file nor a folder: reading a pipe waits for ever.

    Raises:
        ModelError: names the first.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if not (entry.is_file() or entry.is_dir()):
            kind = "a link to nothing" if entry.is_symlink() and not entry.exists() else "no regular file"
            raise ModelError(f"{entry} is {kind}")


def unloadable(field: str, name: str | None, error: BaseException) -> ModelError:
    """The error of a model or tokenizer that a library cannot read, with what helps."""
    if (fault := cache_fault(error)) is not None:
        return ModelError(f"{field}={name!r} cannot be loaded: {fault}")
    return ModelError(f"{field}={name!r} cannot be loaded: {words(error)} {remedy(field, name)}")


def remedy(field: str, name: str | None) -> str:
    """What helps where a model or tokenizer cannot be read."""
    if Path(str(name)).is_dir():
        needed = "its tokenizer" if "tokenizer" in field else "config.json, safetensors and a tokenizer"
        return f"The folder must hold {needed}, complete and readable."
    return (
        f"If it is a Hub id, check its spelling, that this machine reaches the Hub (or download it before: "
        f"hf download {name}), and that you are logged in if it is gated (hf auth login)."
    )
