"""Whether ranks hold parts of a model's weights."""

from __future__ import annotations

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has spread the weights over ranks, which then make every forward pass together."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
