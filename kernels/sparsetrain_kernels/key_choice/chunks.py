"""From logarithms of weights to lists, for some rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.key_choice.inputs import ChoiceInputs
from sparsetrain_kernels.top_p_selection import PositionLists, top_k_lists, top_p_lists


def row_heads(inputs: ChoiceInputs) -> int:
    """Rows of logarithms of weights that a chosen row has: one for each query head, or for each group, if the largest
    of a group is all that counts."""
    return inputs.key.shape[1] if inputs.p == 0 else inputs.query.shape[1]


def lists_of(inputs: ChoiceInputs, weights: Tensor, lengths: Tensor, backend: str) -> PositionLists:
    """The lists of rows whose keys weigh ``exp(weights)``.

    Args:
        inputs: what is chosen.
        weights: fp16 ``[rows, row_heads, columns]``; column ``c`` is position ``c`` of the row's document.
        lengths: int32 ``[rows]``, the keys that each row sees.
        backend: which implementation.
    """
    zero = torch.zeros(weights.shape[:2], device=weights.device)
    alike: dict[str, Any] = {"lengths": lengths, "num_kv_heads": inputs.key.shape[1], "backend": backend}
    alike |= {"sinks": inputs.sinks, "recent": inputs.window}
    if inputs.p == 0:
        return top_k_lists(weights, zero, inputs.capacity, width=inputs.width, **alike)
    return top_p_lists(weights, zero, inputs.p, capacity=inputs.capacity, group=inputs.group, **alike)
