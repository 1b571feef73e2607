"""What is known about a recipe's model from this machine's files alone, without loading it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sparsetrain.errors import ModelError
from sparsetrain.recipe.schema import ModelSection, Recipe
from sparsetrain.textfile import read_text

OWN_MODELS = "sparsetrain:"


def model_folder(section: ModelSection) -> Path | None:
    """The local folder of a model, None for a Hub id and for random weights."""
    if section.path is None:
        return None
    if section.path.startswith(OWN_MODELS):
        folder = Path(__file__).parents[1] / "assets" / section.path.removeprefix(OWN_MODELS)
    else:
        folder = Path(os.path.expanduser(section.path))
    return folder if os.path.isdir(folder) else None


def is_own(recipe: Recipe) -> bool:
    """Whether the model can be looked at here and may be wrong: what is written as a place on this machine, or a shape
    that the recipe gives.

    What ships with the package is known to be right, with more positions too, where the recipe adds nothing to it.
    """
    section = recipe.model
    if section.architecture is not None or any(map(_lies_here, (section.path, section.tokenizer))):
        return True
    if section.path is None or not section.path.startswith(OWN_MODELS):
        return False
    altered = not section.config_overrides.keys() <= {"max_position_embeddings"} or section.tokenizer is not None
    return altered or recipe.lora is not None or recipe.sequence.parallel > 1 or model_folder(section) is None


def _lies_here(name: str | None) -> bool:
    """Whether a name is that of a folder, there or not, and neither a Hub id nor what ships with the package."""
    if name is None or name.startswith(OWN_MODELS):
        return False
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.path.exists(name)


def model_config(section: ModelSection) -> dict[str, Any]:
    """The transformers config of a model, empty where it is not on this machine."""
    if section.architecture is not None:
        return section.architecture
    folder = model_folder(section)
    if folder is None:
        return {}
    try:
        config = json.loads(read_text(folder / "config.json", "config.json", ModelError))
    except (ModelError, ValueError, RecursionError):
        return {}  # loading the model reports what is wrong with it
    return config if isinstance(config, dict) else {}


def decoder_config(section: ModelSection) -> dict[str, Any]:
    """The same with the recipe's overrides, and the fields of its text part where there are several."""
    config = model_config(section) | section.config_overrides
    text_config = config.get("text_config")
    return {**text_config, **config} if isinstance(text_config, dict) else config


def num_layers(section: ModelSection) -> int | None:
    """Decoder layers of a model, None where its config is not on this machine."""
    layers = decoder_config(section).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None
