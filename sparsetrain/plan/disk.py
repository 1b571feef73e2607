"""What a run writes to disk: checkpoints, with masters and optimizer states of what is trained, and the model."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sparsetrain.counted import counted
from sparsetrain.errors import ModelError, first_line
from sparsetrain.plan.devices import find_device
from sparsetrain.plan.setting import Setting
from sparsetrain.plan.shape import find_shape
from sparsetrain.plan.states import MASTER_BYTES, saved_bytes
from sparsetrain.recipe.local_model import model_folder
from sparsetrain.recipe.schema import ModelSection, Recipe

# Where the model's shape is unknown, and with it which parameters are matrices: the most that each keeps.
_MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8.0 / 256, "adafactor": 0.0, "muon": 8.0}


@dataclass(frozen=True)
class Room:
    """The disk room of a run."""

    checkpoints: int
    """Kept at one time: a new one is complete before the oldest is removed."""
    checkpoint: float
    """Bytes of one."""
    model: float
    """Bytes of the exported weights."""
    held: str
    """What a checkpoint holds, in words."""
    certain: bool
    """Whether the trained parameters are known; if not, all are counted."""

    @property
    def needed(self) -> float:
        """Bytes in all."""
        return self.checkpoints * self.checkpoint + self.model

    def describe(self) -> str:
        """``3 checkpoints of 0.6B parameters (by its name)``."""
        return f"{counted(self.checkpoints, 'checkpoint')} of {self.held}"


def room_of(recipe: Recipe) -> Room | None:
    """The disk room of a recipe's run; None if the size of its model is not known on this machine."""
    size = count_parameters(recipe)
    if size is None:
        return None
    parameters, source = size
    held, stored, certain = f"{_short(parameters)} parameters ({source})", parameters, True
    setting = _setting(recipe)
    if not _trains_all(recipe):
        if setting is None:
            held, certain = f"{held}, if all were trained", False
        elif setting.parameters.trained < parameters:
            stored = setting.parameters.trained
            held = f"{_short(stored)} trained parameters of {held}"
    section = recipe.checkpoint
    weight = 4 if recipe.model.dtype == "float32" else 2
    exported = stored if recipe.lora is not None else parameters
    return Room(
        checkpoints=section.keep_last + (section.keep_best is not None) + 1,
        checkpoint=stored * _saved(recipe, setting),
        model=exported * weight if section.export else 0,
        held=held,
        certain=certain,
    )


def saved_a_parameter(recipe: Recipe) -> float:
    """Bytes that a checkpoint takes for each trained parameter: its master and what the optimizer keeps of it."""
    return _saved(recipe, _setting(recipe))


def _saved(recipe: Recipe, setting: Setting | None) -> float:
    if setting is not None and setting.parameters.trained:
        return saved_bytes(setting) / setting.parameters.trained
    optimizer = recipe.train.optimizer
    master = MASTER_BYTES[optimizer.states]
    return master + _MOMENT_BYTES[optimizer.name] * master / MASTER_BYTES["float32"]


def _setting(recipe: Recipe) -> Setting | None:
    """One rank of a run; None if the shape of its model is not known on this machine."""
    try:
        shape = find_shape(recipe.model)
    except ModelError:
        return None
    return Setting(recipe, shape, recipe.sequence.parallel, find_device("h100"), liger=False)


def count_parameters(recipe: Recipe) -> tuple[int, str] | None:
    """Parameters of a recipe's model without loading it, and how that is known; None where it is not."""
    section = recipe.model
    if section.architecture is not None:
        return _count_built(section), "by its architecture"
    path = str(section.path)
    folder = model_folder(section)
    if folder is not None and (shards := list(folder.glob("model*.safetensors"))):
        return sum(map(_count_stored, shards)), "counted in its files"
    cached = None if folder is not None else _cached_config(path, section.revision)
    known = folder if cached is None else cached.parent
    if known is not None:
        local = section.model_copy(update={"path": str(known), "revision": None})
        return _count_built(local), "by its config"
    named = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BbMm])(?![a-zA-Z0-9])", path.rsplit("/", 1)[-1])
    if named:
        return int(float(named[1]) * (1e9 if named[2] in "Bb" else 1e6)), "by its name"
    return None


def _trains_all(recipe: Recipe) -> bool:
    return recipe.lora is None and recipe.train.parameters == "all" and not recipe.train.freeze


def _short(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e8 else f"{count / 1e6:.3g}M"


def _cached_config(path: str, revision: str | None) -> Path | None:
    """The config of a Hub model in the local cache. Its weights there may be incomplete, so they are not counted."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path, "config.json", revision=revision) if path.count("/") == 1 else None
    return Path(config) if isinstance(config, str) else None


def _count_stored(file: Path) -> int:
    """Parameters of a safetensors file by its header: 8 bytes of length, then JSON.

    Raises:
        ModelError: the header is damaged.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(stream.read(length))
        return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(f"{file} is not a complete safetensors file: {first_line(error)}") from error


def _count_built(section: ModelSection) -> int:
    """Parameters of a recipe's model, built without storage."""
    from sparsetrain.modeling.configs import config_source

    source = config_source(section)
    return source.skeleton(source.config(), trust_remote_code=section.trust_remote_code).num_parameters()
