"""What follows from the bounds of packed documents, found once for all the layers of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsetrain_kernels.inputs import document_bounds

Found = TypeVar("Found")

_KNOWN = WeakIdKeyDictionary()
"""By ``cu_seqlens`` as long as it lives: its version, and what was found from it by what was asked."""


def known_bounds(length: int, cu_seqlens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`~sparsetrain_kernels.inputs.document_bounds`, not to be written to."""
    return from_documents(cu_seqlens, ("bounds", length, device), lambda: document_bounds(length, cu_seqlens, device))


def from_documents(cu_seqlens: Tensor, what: tuple[Any, ...], find: Callable[[], Found]) -> Found:
    """What ``find`` returns, or returned before for the same ``what`` and these documents.

    Every layer of a pass asks with the same tensor, and each answer costs half a dozen launches.
    """
    if _cannot_keep(cu_seqlens):
        return find()
    version, found = _KNOWN.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        found = {}
        _KNOWN[cu_seqlens] = cu_seqlens._version, found
    if what not in found:
        found[what] = find()
    return found[what]


def document_tiles(bounds: Tensor, size: int, most: int) -> Tensor:
    """Tiles of ``size`` that start with their document: the first of each and the one past its last, int32 ``[most,
    2]``, ascending; empty ones at the end."""
    counts = bounds.diff().add(size - 1).div(size, rounding_mode="floor")
    until = counts.cumsum(0)
    tile = torch.arange(most, device=bounds.device)
    document = torch.searchsorted(until, tile, right=True)
    exists = document < len(counts)
    document = document.clamp(max=len(counts) - 1)
    start = bounds.take(document) + (tile - until.take(document) + counts.take(document)) * size
    end = torch.minimum(start + size, bounds.take(document + 1))
    return torch.stack((start, torch.where(exists, end, start)), 1).int().contiguous()


def _cannot_keep(cu_seqlens: Tensor) -> bool:
    """Where changes would go unnoticed: tensors without versions, those of a graph that is traced or captured."""
    capturing = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    return capturing or cu_seqlens.is_inference() or torch.compiler.is_compiling()
