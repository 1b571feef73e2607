"""Facts about a recipe's model from local files, without loading it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sparsetrain.errors import ModelError
from sparsetrain.recipe.schema import ModelSection, Recipe
from sparsetrain.textfile import read_text

OWN_MODELS = "sparsetrain:"
"""Prefix of the checkpoints that ship with the package."""


def model_folder(section: ModelSection) -> Path | None:
    """The local folder of a model; None for a Hub id and for random weights."""
    if section.path is None:
        return None
    if section.path.startswith(OWN_MODELS):
        folder = Path(__file__).parents[1] / "assets" / section.path.removeprefix(OWN_MODELS)
    else:
        folder = Path(os.path.expanduser(section.path))
    return folder if os.path.isdir(folder) else None


def is_own(recipe: Recipe) -> bool:
    """Whether the model can and should be checked locally: a local folder, or an architecture in the recipe.

    The shipped checkpoint is not checked if the recipe overrides nothing but its number of positions.
    """
    section = recipe.model
    if section.architecture is not None or any(map(_lies_here, (section.path, section.tokenizer))):
        return True
    if section.path is None or not section.path.startswith(OWN_MODELS):
        return False
    altered = not section.config_overrides.keys() <= {"max_position_embeddings"} or section.tokenizer is not None
    return altered or recipe.lora is not None or recipe.sequence.parallel > 1 or model_folder(section) is None


def refuse_missing(name: str, field: str) -> None:
    """Refuse a name that is neither a folder nor can be a Hub id.

    Args:
        field: What names it, for the message.

    Raises:
        ModelError: It is neither.
    """
    # os.path, because pathlib raises for unknown users (~name) and for invalid file names.
    place = os.path.expanduser(name)
    if name.startswith(OWN_MODELS) or (name and os.path.isdir(place)):
        return
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.path.exists(place):
        raise ModelError(f"{field}={name!r}: there is no such folder")


def _lies_here(name: str | None) -> bool:
    """Whether a name is a local path (existing or not), and neither a Hub id nor a shipped checkpoint."""
    if name is None or name.startswith(OWN_MODELS):
        return False
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.path.exists(name)


def model_config(section: ModelSection) -> dict[str, Any]:
    """The transformers config of a model; empty if it is not on this machine."""
    if section.architecture is not None:
        return section.architecture
    folder = model_folder(section)
    if folder is None:
        return {}
    try:
        config = json.loads(read_text(folder / "config.json", "config.json", ModelError))
    except (ModelError, ValueError, RecursionError):
        return {}  # loading the model reports the error
    return config if isinstance(config, dict) else {}


def decoder_config(section: ModelSection) -> dict[str, Any]:
    """The config of the text decoder, with the recipe's overrides; empty if it is not on this machine."""
    config = model_config(section) | section.config_overrides
    text_config = config.get("text_config")
    return {**text_config, **config} if isinstance(text_config, dict) else config


def num_layers(section: ModelSection) -> int | None:
    """The number of decoder layers of a model; None if its config is not on this machine."""
    layers = decoder_config(section).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None
