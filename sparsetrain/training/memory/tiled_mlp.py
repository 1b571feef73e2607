"""The MLP of each decoder layer a part of the tokens at a time, so that its wide intermediates never exist at once.

DeepSpeed's ``TiledMLP`` does the same by an autograd function of its own. torch's checkpoint per tile is used instead:
it replays the dropout of LoRA where that draws again in backward; it finds trained adapters inside an MLP whose input
needs no gradient; a weight gets its gradient once, after all tiles, at every ZeRO stage; and no tile goes missing when
the tokens do not divide.
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
"""What decoder layers call their MLP."""


def tile_mlps(model: nn.Module, num_chunks: int) -> int:
    """Make the MLP beside every attention layer of a sparsified model compute ``num_chunks`` tiles, one by one.

    Outputs and gradients stay the same; the MLP is computed once more in backward, tile by tile. The modules stay as
    they are and keep their names: only their ``forward`` is wrapped.

    Args:
        num_chunks: the same on every rank, in training and evaluation, whatever the length of the row.

    Returns:
        How many MLPs there are.

    Raises:
        ModelError: the decoder layers have no MLP by a known name.
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
    """The forward of one MLP, tile by tile."""

    def __init__(self, mlp: nn.Module, forward: Callable[..., Any], num_chunks: int) -> None:
        self.name, self.forward, self.num_chunks = type(mlp).__name__, forward, num_chunks

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., T, width]`` to the same shape; every token is computed by itself."""
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
