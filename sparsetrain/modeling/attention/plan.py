"""The plan of one attention layer, made by :func:`~sparsetrain.modeling.sparsify`."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.generation.settings import Decode
from sparsetrain.methods.base import Method

PLAN_ATTRIBUTE = "sparsetrain_plan"
"""Attribute of an attention module that holds its :class:`LayerPlan`."""


@dataclass(frozen=True)
class LayerPlan:
    """The attention of one layer."""

    index: int
    """Index of the decoder layer."""
    method: Method | None
    """How the layer attends; None where it stays as the model made it."""
    window: int | None
    """Sliding window in tokens the model gives this layer, its own token included."""
    leaks_between_documents: bool
    """The model also mixes tokens outside attention (state-space or convolution layers), which packing cannot stop."""
    decode: Decode | None = None
    """The choice of keys for a step of generation; None: all that the layer attends to."""
