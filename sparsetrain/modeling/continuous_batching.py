"""Continuous batching has attention functions of its own: a sparsified model refuses it and says what to call."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager

from sparsetrain.errors import ModelError


class NoManager(ContinuousBatchingManager):
    """Stands where a model keeps its manager, which every way into continuous batching asks first."""

    def __init__(self) -> None:
        self.continuous_batching_config = ContinuousBatchingConfig()

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Raises :class:`ModelError`: what it would switch to is dense."""
        raise ModelError(
            f"continuous batching (generate_batch) would run {type(model).__name__} densely: it knows no attention but "
            "eager, sdpa and flash, and this model attends by its sparsetrain method; call model.generate, with "
            "prompts of unequal lengths padded on the left, or use sparsetrain generate --batch"
        )

    def destroy(self) -> None:
        """Nothing: it holds nothing."""


def refuse_continuous_batching(model: nn.Module, layer: nn.Module) -> None:
    """Make a model refuse continuous batching, and a switch to flash attention.

    Args:
        layer: one of its attention layers.
    """
    for each in model.modules():
        if isinstance(each, PreTrainedModel) and layer in each.modules():
            each._cached_continuous_batching_manager = NoManager()  # type: ignore[assignment]
            # Without the manager above, it would switch every model to flash attention that supports it.
            each._supports_flash_attn = False
