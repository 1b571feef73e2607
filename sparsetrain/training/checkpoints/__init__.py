"""Checkpoints that are written atomically and can be loaded on any number of ranks.

:mod:`.files` is the format of the tensors, :mod:`.schema` that of the JSON files, :mod:`.manifest` the list of files.
:mod:`.content` checks consistency, :mod:`.engine_state` reads and writes a DeepSpeed engine, :mod:`.store` manages the
folder, :mod:`.saver` saves during training, and :mod:`.loading` restores.
"""

from __future__ import annotations

from sparsetrain.training.checkpoints.content import recorded_recipe
from sparsetrain.training.checkpoints.loading import check_start, load, read_weights
from sparsetrain.training.checkpoints.saver import Saver
from sparsetrain.training.checkpoints.state import TrainState
from sparsetrain.training.checkpoints.store import find, newest

__all__ = ["Saver", "TrainState", "check_start", "find", "load", "newest", "read_weights", "recorded_recipe"]
