"""The tokens of a call in one flat list, and their scores as integers on one axis: whatever the shapes, one problem.

Documents (of all heads and all sequences) follow one another on both. SPARSEK asks only whether scores differ by more
than one, and if not, by how much: gaps between neighbouring scores are cut at 2, and documents are 2 apart. In a later
document all keys of earlier ones lie too low to matter, and in an earlier one those of later ones are not there yet.

Sums of integers are exact. So results are the same on every run, and whatever else is in the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.inputs import document_bounds

ONE = 2**36
"""A difference of one between two scores, on the axis of integers."""
MAX_TOKENS = 2**25
"""Tokens of all heads together: as many gaps of two fit into 64 bits."""


class FlatTokens(NamedTuple):
    """The call's tokens, flattened document after document: ``L = B * H * N``. Rows and tokens are the same numbers."""

    start: Tensor
    """int32 ``[L]``: where the document of token r starts."""
    end: Tensor
    """int32 ``[L]``: where it ends."""
    entry: Tensor
    """int32 ``[L]``: the row at which the token starts to compete; the end of its document if it never does."""
    order: Tensor
    """int64 ``[L]``: the tokens of each document by score, ascending, of equal ones the older first."""


class Axis(NamedTuple):
    """The sorted scores as integers, and their points: ``u_j - 1`` and ``u_j``, at which f has kinks."""

    whole: Tensor
    """fp64 ``[L]``: the largest whole number that is not above the score."""
    fraction: Tensor
    """int64 ``[L]``: the rest, 0 to ``ONE``."""
    coordinate: Tensor
    """int64 ``[L]``: the scores, but gaps are cut at two and documents are two apart."""
    below: Tensor
    """int64 ``[L]``: where the point ``u_j - 1`` is among all points in ascending order."""
    point: Tensor
    """int64 ``[L]``: where the point ``u_j`` is."""
    past_point: Tensor
    """int64 ``[L]``: the same behind the last point of an equal score."""


def flatten_tokens(scores: Tensor, window: int, sinks: int, cu_seqlens: Tensor | None) -> FlatTokens:
    """The tokens of ``scores [B, H, N]``, their documents, their first rows as candidates, and their order by score."""
    length = scores.shape[2]
    start, end = document_bounds(length, cu_seqlens, scores.device)
    order = with_one_nan(scores).argsort(dim=-1, stable=True)
    if cu_seqlens is not None:
        # Also stable: within a document, the order by score stays.
        by_document = start.expand(scores.shape).gather(-1, order).argsort(dim=-1, stable=True)
        order = order.gather(-1, by_document)
    token = torch.arange(length, dtype=torch.int32, device=scores.device)
    entry = torch.where(token < start + sinks, end, (token + window).minimum(end))
    offset = head_offsets(scores)
    start, end, entry, order = ((rows + offset).flatten() for rows in (start, end, entry, order))
    return FlatTokens(start, end, entry, order)


def with_one_nan(scores: Tensor) -> Tensor:
    """Scores to be sorted, with NaN of either sign as one: on CUDA, PyTorch sorts the negative ones to the front."""
    return scores.nan_to_num(nan=float("nan"), posinf=float("inf"), neginf=-float("inf"))


def head_offsets(scores: Tensor) -> Tensor:
    """int32 ``[B, H, 1]``: where each head of each sequence starts in the flat list."""
    batch, heads, length = scores.shape
    return torch.arange(0, batch * heads * length, length, dtype=torch.int32, device=scores.device).view(
        batch, heads, 1
    )


def to_axis(sorted_scores: Tensor, start: Tensor) -> Axis:
    """Put the sorted scores on the axis of integers.

    Infinities are equal, and NaN, which sorts behind them, is another one.
    """
    infinity = float("inf")
    exact = sorted_scores.double().nan_to_num(nan=infinity, posinf=infinity, neginf=-infinity)
    whole = exact.floor()
    fraction = ((exact - whole).nan_to_num_(nan=0.0) * ONE).round_().long()
    rank = torch.arange(start.numel(), device=start.device)
    gap = torch.empty_like(fraction)
    gap[1:] = whole.diff().nan_to_num_(nan=0.0).clamp_(-3, 3).long() * ONE + fraction.diff()
    coordinate = torch.where(start == rank, 2 * ONE, gap.clamp_(max=2 * ONE)).cumsum_(0)
    # Of points at the same coordinate, those of the kind u_j come first: the threshold is there before it is beyond.
    lower_points = torch.searchsorted(coordinate, coordinate + ONE)
    return Axis(
        whole,
        fraction,
        coordinate,
        below=rank + torch.searchsorted(coordinate, coordinate - ONE, right=True),
        point=rank + lower_points,
        past_point=torch.searchsorted(coordinate, coordinate, right=True) + lower_points,
    )


def by_point(axis: Axis, at_point: Tensor, below: Tensor) -> Tensor:
    """``[2 * L]``: what belongs to the points ``u_j`` and ``u_j - 1``, in the order of the points."""
    merged = torch.empty(2 * len(below), dtype=below.dtype, device=below.device)
    return merged.scatter_(0, axis.point, at_point).scatter_(0, axis.below, below)
