"""Compute the MLP of each decoder layer in tiles of tokens, so that its wide intermediates never exist all at once.

DeepSpeed's ``TiledMLP`` does the same with its own autograd function. torch's checkpoint per tile is used instead: it
repeats LoRA's dropout masks in backward, it gives gradients to adapters inside an MLP whose input needs none, a weight
gets its gradient once after all tiles at every ZeRO stage, and no tile is lost if the tokens do not divide evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparse_layers
from sparsetrain.training.memory.chunks import split_evenly

NAMES = ("mlp", "feed_forward")
"""Attribute names of the MLP in decoder layers."""


def tile_mlps(model: nn.Module, num_chunks: int) -> int:
    """Make the MLP of every decoder layer of a sparsified model compute its tokens in ``num_chunks`` tiles.

    Outputs and gradients stay the same; the MLP is recomputed in backward, tile by tile. The modules and their names do
    not change: only ``forward`` is wrapped.

    Args:
        num_chunks: The number of tiles, the same on every rank, in training and evaluation, for rows of any length.

    Returns:
        The number of MLPs.

    Raises:
        ModelError: The decoder layers have no MLP with a known name.
    """
    mlps = _mlps(model)
    if not mlps:
        raise ModelError(
            f"train.mlp_chunk: the decoder layers of {type(model).__name__} have no module named "
            f"{' or '.join(NAMES)}; set it to null"
        )
    for mlp in mlps:
        mlp.forward = _Tiled(mlp, mlp.forward, num_chunks)
    return len(mlps)


class _Tiled:
    """The forward of one MLP in tiles."""

    def __init__(self, mlp: nn.Module, forward: Callable[..., Any], num_chunks: int) -> None:
        self.name, self.forward, self.num_chunks = type(mlp).__name__, forward, num_chunks

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From ``[..., T, width]`` to the same shape; tokens are independent of each other."""
        outputs = [self._tile(part) for part in split_evenly(hidden_states, self.num_chunks, dim=-2)]
        return torch.cat(outputs, dim=-2)

    def _tile(self, part: torch.Tensor) -> torch.Tensor:
        differentiable = torch.is_grad_enabled()
        output = checkpoint(self.forward, part, use_reentrant=False) if differentiable else self.forward(part)
        if not isinstance(output, torch.Tensor):
            raise ModelError(
                f"train.mlp_chunk: {self.name} returns more than its output (a mixture of experts?) and cannot be "
                "tiled; set it to null"
            )
        return output


def _mlps(model: nn.Module) -> list[nn.Module]:
    attention = {id(module) for _, module, _ in sparse_layers(model)}
    found = []
    for layer in model.modules():
        children = dict(layer.named_children())
        if any(id(child) in attention for child in children.values()):
            found += [children[name] for name in NAMES if name in children]
    return found
