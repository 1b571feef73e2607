"""Whether a model on disk is the one in memory: compared by the model's own names, and by what it computes.

Transformers renames, splits and converts tensors as it saves them and undoes it as it loads. Only a model that was
loaded again tells whether all of it came back.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

PIECE = 1 << 26
"""Elements of a tensor that are looked at in one go."""


def own_tensors(model: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a model by name.

    Args:
        names: which; by default all of them, and of tied ones the first.
    """
    kept = model.state_dict(keep_vars=True)
    if names is not None:
        yield from ((name, kept[name]) for name in names)
        return
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers; one may be kept in a wider dtype than the other."""
    if first.shape != second.shape:
        return False
    wide = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.detach().to(wide), second.detach().to(first.device, wide))


def checksums(model: nn.Module) -> dict[str, str]:
    """What the tensors of a model hold, in a few bytes each, so that the model itself can be let go."""
    return {name: _checksum(tensor) for name, tensor in own_tensors(model)}


def _checksum(tensor: torch.Tensor) -> str:
    total = 0
    for piece in tensor.detach().cpu().flatten().split(PIECE):
        wide = piece.double() if piece.dtype == torch.float64 else piece.float() if piece.is_floating_point() else piece
        total = zlib.crc32(wide.contiguous().view(torch.uint8).numpy(), total)
    return f"{tuple(tensor.shape)} {total:08x}"


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative root mean square difference of two tensors; infinite where one is not finite."""
    right = right.float()
    error = ((found.to(right) - right).norm() / right.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def rounding(dtype: torch.dtype) -> float:
    """The relative error that rounding alone may make of logits in a dtype."""
    return {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 0.1)


def logits(model: Any, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a model on a device computes of one document ``[1, T]``: ``[1, T, vocabulary]``."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=tokens.to(device), use_cache=False).logits
    finally:
        model.train(training)
