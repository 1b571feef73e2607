"""Arguments that several commands take."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsetrain.cli.completion import complete_recipe, complete_run, complete_setting
from sparsetrain.durable import folder_fault
from sparsetrain.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch

    from sparsetrain.recipe import LoadedRecipe

MOST_GPUS = 2**17
"""Maximum number of GPUs for a batch or a plan."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of ``--dtype``."""

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that override the recipe, such as train.lr=2e-5.",
        show_default=False,
        autocompletion=complete_setting,
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run, a folder of a model or of adapters, a Hub id, or sparsetrain:tiny.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
DtypeOption = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cuda, cuda:1 or cpu; by default the GPU if there is one.", show_default=False)
]


def print_notes(loaded: LoadedRecipe) -> None:
    """Print the notes of loading a recipe on standard error."""
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)


def check_new(flag: str, path: Path, kind: str) -> None:
    """Refuse a path that exists, or whose folder does not or is not writable.

    Args:
        kind: ``file`` or ``folder``, for the message.

    Raises:
        DataError: names the flag and the path.
    """
    if path.exists() or path.is_symlink():
        raise DataError(f"--{flag} {path} exists already; remove it, or name another {kind}")
    if not path.parent.is_dir():
        raise DataError(f"--{flag} {path}: there is no folder {path.parent}; make it first")
    if (fault := folder_fault(path.parent)) is not None:
        raise DataError(f"--{flag} {path}: {fault}; make it writable, or name another")


def check_place(path: Path) -> None:
    """Refuse an ``--output`` that is no file which can be written; one that exists is for the command to judge.

    Raises:
        DataError: names the path.
    """
    if path.is_dir():
        raise DataError(f"--output {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise DataError(f"--output {path}: there is no such folder to write to; name a file in one that exists")
    if (fault := folder_fault(path.parent)) is not None:
        raise DataError(f"--output {path}: {fault}; name another folder")


def check_first(model: str, dtype: str, device: str | None) -> None:
    """Refuse what can be refused of these without torch, which takes seconds to import.

    Raises:
        ModelError: names the option and the value.
    """
    from sparsetrain.inference.models import MODEL
    from sparsetrain.recipe.local_model import refuse_missing
    from sparsetrain.recipe.mistaken import is_recipe_instead

    if dtype not in DTYPES:
        raise ModelError(f"--dtype {dtype} is not known; choose one of {', '.join(DTYPES)}")
    if device is not None and not re.fullmatch(r"(cpu|cuda)(:[0-9]{1,3})?", device):
        raise ModelError(f"--device {device} is not known; choose cuda, cuda:1 or cpu")
    if (advice := is_recipe_instead(model)) is not None:
        raise ModelError(f"{MODEL}={model!r}: {advice}")
    refuse_missing(model, MODEL)


def choose_dtype(name: str) -> torch.dtype | None:
    """The dtype of ``--dtype``, which :func:`check_first` knows; None for ``auto``."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def choose_device(name: str | None) -> Any:
    """The device of ``--device``, whose form :func:`check_first` knows; by default the GPU if there is one.

    Raises:
        ModelError: this machine has none of that name.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        usable = "choose cpu" if count == 0 else f"choose one up to cuda:{count - 1}, or cpu"
        raise ModelError(f"--device {name}: this machine has {count} CUDA devices that torch can use; {usable}")
    return device
