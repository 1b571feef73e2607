"""Checkpoints that are complete or absent, and that any number of ranks can take up.

:mod:`.files` holds the format of the tensors, :mod:`.schema` that of the others, :mod:`.manifest` what a checkpoint
consists of, :mod:`.content` whether it makes sense, :mod:`.engine_state` where a DeepSpeed engine keeps it,
:mod:`.store` the folder, :mod:`.saver` the writing beside the training, and :mod:`.loading` the way back.
"""

from __future__ import annotations

from sparsetrain.training.checkpoints.content import recorded_recipe
from sparsetrain.training.checkpoints.loading import load, read_weights
from sparsetrain.training.checkpoints.saver import Saver
from sparsetrain.training.checkpoints.state import TrainState
from sparsetrain.training.checkpoints.store import find, newest

__all__ = ["Saver", "TrainState", "find", "load", "newest", "read_weights", "recorded_recipe"]
