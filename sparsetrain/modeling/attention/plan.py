"""What :func:`~sparsetrain.modeling.sparsify` decided for one attention layer, and where the layer keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.generation.settings import Decode
from sparsetrain.methods.base import Method

PLAN_ATTRIBUTE = "sparsetrain_plan"
"""Where an attention module keeps its :class:`LayerPlan`."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer attends."""

    index: int
    """Index of the decoder layer."""
    method: Method | None
    """How the layer attends; None where it stays as the model made it."""
    window: int | None
    """Sliding window in tokens the model gives this layer, its own token included."""
    leaks_between_documents: bool
    """The model also mixes tokens outside attention (state-space or convolution layers), which packing cannot stop."""
    decode: Decode | None = None
    """What a step of generation reads; None where that is what the layer attends to."""
