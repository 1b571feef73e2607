"""Rows and batches: packed documents as one flat row with document boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sparsetrain.data.document import IGNORE as IGNORE


@dataclass(frozen=True)
class Row:
    """One training row: up to ``sequence.length`` tokens of one or more documents."""

    input_ids: np.ndarray
    """int64 ``[n]``."""
    labels: np.ndarray
    """int64 ``[n]``, aligned with ``input_ids`` (not shifted); ``-100`` means no loss. The first token of every
    document is ``-100``, because no token precedes it."""
    lengths: list[int]
    """Tokens of each document; they sum to ``n``."""
    origin: list[str]
    """Name of each document: ``source:row``, with ``@token`` for the continuation of a long document."""


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass, flattened to ``[1, T]``: no padding, boundaries in ``cu_seqlens``."""

    input_ids: torch.Tensor
    """int64 ``[1, T]``."""
    labels: torch.Tensor
    """int64 ``[1, T]``, aligned with ``input_ids``; ``-100`` means no loss."""
    position_ids: torch.Tensor
    """int64 ``[1, T]``; restarts at 0 with every document."""
    cu_seqlens: torch.Tensor
    """int32 ``[documents + 1]``: the start of each document, and ``T``."""
    num_target_tokens: int
    """Number of tokens with loss. Shifting the labels loses none, since no document starts with one."""
    origin: list[str]
    """Name of each document."""
    prompts: list[int]
    """Tokens of each document before its first target, all where it has none. Of plain text that is 1."""
    padding: int = 0
    """Padding tokens at the end, for sequence parallelism if the length is not divisible."""

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.input_ids.numel() - self.padding

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("input_ids", "labels", "position_ids", "cu_seqlens")
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Step:
    """The batches of one rank in one optimizer step."""

    micro_batches: list[Batch]
    """One batch per accumulation step."""
    state: dict[str, Any]
    """State of the row stream after this step, equal on every rank and serialisable as JSON."""


def collate(rows: Sequence[Row]) -> Batch:
    """Concatenate rows to one flat batch ``[1, T]``. All documents keep their boundaries and positions."""
    lengths = [length for row in rows for length in row.lengths]
    labels = np.concatenate([row.labels for row in rows])
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([row.input_ids for row in rows]))[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        cu_seqlens=torch.from_numpy(bounds),
        num_target_tokens=int((labels != IGNORE).sum()),
        origin=[name for row in rows for name in row.origin],
        prompts=prompt_lengths(labels, bounds),
    )


def prompt_lengths(labels: np.ndarray, bounds: np.ndarray) -> list[int]:
    """Tokens of each document before its first target, all where it has none.

    Args:
        labels: int64 ``[T]``; ``-100`` means no loss.
        bounds: int32 ``[documents + 1]``: the start of each document, and ``T``.
    """
    targets = np.flatnonzero(labels != IGNORE)
    first = np.append(targets, len(labels))[np.searchsorted(targets, bounds[:-1])]
    return [int(n) for n in np.minimum(first, bounds[1:]) - bounds[:-1]]
