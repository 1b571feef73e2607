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
    """The weights of several linear modules as one tensor, of which theirs become views. If one of them gets other
    weights (``to``, a loaded checkpoint, a merged adapter), all are plain modules again."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self._layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self._weight = torch.cat([layer.weight.data for layer in layers])
        self._bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
        for layer, part in zip(layers, self._weight.split(self._sizes), strict=True):
            layer.weight.data = part
        if self._bias is not None:
            for layer, part in zip(layers, self._bias.split(self._sizes), strict=True):
                layer.bias.data = part
        self._held: tuple[Tensor | None, tuple[Tensor, ...]] = None, ()
        for index, layer in enumerate(layers):
            vars(layer)["forward"] = partial(self._project, index, layer)

    def _project(self, index: int, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """One module's product. The first of a group computes those of the others with it."""
        many = hidden.numel() > ROWS * layer.in_features
        if many or (torch.is_grad_enabled() and (hidden.requires_grad or layer.weight.requires_grad)):
            return F.linear(hidden, layer.weight, layer.bias)
        if index == 0:
            if not torch.compiler.is_compiling() and self._have_moved():
                self._part()
                return F.linear(hidden, layer.weight, layer.bias)
            self._held = hidden, F.linear(hidden, self._weight, self._bias).split(self._sizes, dim=-1)
        # Read at once: another thread may run the model.
        given, parts = self._held
        if given is not hidden:
            return F.linear(hidden, layer.weight, layer.bias)
        if index == len(self._sizes) - 1:
            self._held = None, ()
        return parts[index]

    def _have_moved(self) -> bool:
        wholes = (("weight", self._weight),) if self._bias is None else (("weight", self._weight), ("bias", self._bias))
        for name, whole in wholes:
            place = whole.data_ptr()
            for layer in self._layers:
                own = getattr(layer, name)
                if own is None or own.data_ptr() != place or own.dtype != whole.dtype:
                    return True
                place += own.nbytes
        return False

    def _part(self) -> None:
        for layer in self._layers:
            vars(layer).pop("forward", None)


def merge_projections(model: nn.Module) -> int:
    """Merge what can be merged, in place, for inference. Captured and compiled steps keep the weights that they have
    seen: those must not change places afterwards (``to``, ``load``).

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
    kinds = {(each.in_features, each.weight.dtype, each.weight.device, each.bias is None) for each in layers}
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in layers)
    # Quantised and distributed weights are tensors of types of their own.
    plain = all(type(each.weight.data) is Tensor and each.weight.dim() == 2 for each in layers)
    return len(kinds) == 1 and not hooked and plain and len({id(each) for each in layers}) == len(layers)
