"""Projections of one input as one product, where the rows are few: queries, keys and values, and the halves of an MLP.

A step of generation reads every weight for a few rows, and reads those of one large matrix faster than of several small
ones. The modules and the names of their weights stay, and so do the products of many rows, which are as fast alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of modules beside one another that read the same input."""
ROWS = 16
"""The most rows that are projected together."""


class _Merged:
    """The weights of several linear modules as one tensor, of which theirs become views."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._weight = torch.cat([layer.weight.data for layer in layers])
        self._bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
        for layer, part in zip(layers, self._weight.split(self._sizes), strict=True):
            layer.weight.data = part
        self._given: Tensor | None = None
        self._parts: list[Tensor] = []
        for index, layer in enumerate(layers):
            vars(layer)["forward"] = partial(self._project, index, layer)

    def _project(self, index: int, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """One module's product. The first of a group computes those of the others with it."""
        many = hidden.numel() > ROWS * layer.in_features
        if many or (torch.is_grad_enabled() and (hidden.requires_grad or layer.weight.requires_grad)):
            return F.linear(hidden, layer.weight, layer.bias)
        if index == 0:
            self._given = hidden
            self._parts = list(F.linear(hidden, self._weight, self._bias).split(self._sizes, dim=-1))
        elif self._given is not hidden:
            return F.linear(hidden, layer.weight, layer.bias)
        part = self._parts[index]
        if index == len(self._sizes) - 1:
            self._given, self._parts = None, []
        return part


def merge_projections(model: nn.Module) -> int:
    """Merge what can be merged, in place, for inference: weights must not change places afterwards (``to``, ``load``).

    Each group of linear modules is one tensor of weights afterwards, so the model takes as much memory as before.

    Returns:
        The number of groups.
    """
    merged = 0
    for parent in model.modules():
        for names in GROUPS:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            if all(type(layer) is nn.Linear and "forward" not in vars(layer) for layer in layers) and _fit(layers):
                _Merged(layers)
                merged += 1
    return merged


def _fit(layers: list[nn.Linear]) -> bool:
    """Whether one matrix can hold the weights of these modules, each of which is nobody else's."""
    first = layers[0]
    kinds = {(each.in_features, each.weight.dtype, each.weight.device, each.bias is None) for each in layers}
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in layers)
    return (
        len(kinds) == 1 and not hooked and first.weight.dim() == 2 and len({id(each) for each in layers}) == len(layers)
    )
