"""Compare a saved model with the one in memory, by tensor names and by logits.

Transformers renames, splits and converts tensors when it saves them, and reverses this when it loads them. Only loading
the model again shows whether nothing was lost.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

PIECE = 1 << 26
"""Number of tensor elements compared at once."""


def own_tensors(model: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and persistent buffers of a model by name; tensors have any shape ``[...]`` and dtype.

    Args:
        names: The names to yield; by default all, and of tied parameters the first.
    """
    kept = model.state_dict(keep_vars=True)
    if names is not None:
        yield from ((name, kept[name]) for name in names)
        return
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors ``[...]`` of one shape hold the same numbers; their dtypes may differ in width."""
    if first.shape != second.shape:
        return False
    wide = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.detach().to(wide), second.detach().to(first.device, wide))


def checksums(model: nn.Module) -> dict[str, str]:
    """Checksums of a model's tensors by name, so that the model itself can be freed."""
    return {name: _checksum(tensor) for name, tensor in own_tensors(model)}


def _checksum(tensor: torch.Tensor) -> str:
    total = 0
    for piece in tensor.detach().cpu().flatten().split(PIECE):
        if piece.is_floating_point() and piece.dtype != torch.float64:
            piece = piece.float()
        total = zlib.crc32(piece.contiguous().view(torch.uint8).numpy(), total)
    return f"{tuple(tensor.shape)} {total:08x}"


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative root mean square error of ``found`` against ``right``, both ``[...]``; infinite if one is not finite."""
    right = right.float()
    error = ((found.to(right) - right).norm() / right.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def rounding(dtype: torch.dtype) -> float:
    """The relative error of logits that rounding in a dtype may cause."""
    return {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 0.1)


def logits(model: Any, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Compute the logits ``[1, T, vocabulary]`` of one document, int64 ``[1, T]``, on a device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=tokens.to(device), use_cache=False).logits
    finally:
        model.train(training)
