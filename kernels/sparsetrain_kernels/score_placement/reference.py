"""Timestep normalisation (Megalodon, 2404.08801, 3.2) and the slope, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-5
"""Added to the variance, as in Megalodon: the first token of a document has none."""


class Moments(NamedTuple):
    """What normalisation remembers of the tokens before: their sum and sum of squares, fp64 ``[B, heads]``."""

    total: Tensor
    squares: Tensor


class DocumentPositions(NamedTuple):
    """Where the tokens of one call stand in their documents: int64 ``[N]`` or ``[B, N]``."""

    position: Tensor
    """Position within the document."""
    first: Tensor | None
    """Index along N of the document's first token; below 0 where the document began in an earlier call. None where the
    moments of all earlier tokens are known."""


def place_scores(
    linear: Tensor, gain: Tensor | None, positions: DocumentPositions, slope: float, moments: Moments | None = None
) -> tuple[Tensor, Moments | None]:
    """As :func:`sparsetrain_kernels.score_placement.place_scores`."""
    scores: Tensor = linear.double()
    after = None
    if gain is not None:
        scores, after = timestep_norm(linear, positions, moments)
        scores = scores * gain
    return (scores + slope * per_head(positions.position)).to(linear.dtype), after


def timestep_norm(
    scores: Tensor, positions: DocumentPositions, moments: Moments | None = None
) -> tuple[Tensor, Moments]:
    """Normalise each score by mean and variance of the scores of its document up to and including its own.

    Scores of the past never change when a token is added, so a token keeps the score it entered with. Sums run in
    fp64: at a million tokens a sum in fp32 has drifted by more than the scores' differences.

    Args:
        scores: ``[B, heads, N]``.
        positions: of the N tokens.
        moments: of the same documents' tokens in earlier calls.

    Returns:
        fp64 ``[B, heads, N]``, and the moments after the last token.
    """
    wide = scores.double()
    total = _sum_so_far(wide, positions, moments and moments.total)
    squares = _sum_so_far(wide * wide, positions, moments and moments.squares)
    count = per_head(positions.position + 1)
    mean = total / count
    variance = (squares / count - mean * mean).clamp(min=0.0)
    return (wide - mean) * (variance + EPSILON).rsqrt(), Moments(total[..., -1].detach(), squares[..., -1].detach())


def _sum_so_far(values: Tensor, positions: DocumentPositions, before: Tensor | None) -> Tensor:
    """Running sums ``[B, heads, N]`` that start anew with each document, or go on from ``before``."""
    running = values.cumsum(dim=-1)
    if before is not None:
        return running + before[..., None]
    assert positions.first is not None
    ahead = torch.nn.functional.pad(running, (1, 0))
    return running - ahead.gather(-1, per_head(positions.first).expand_as(values))


def per_head(position: Tensor) -> Tensor:
    """``[N]`` or ``[B, N]`` as it broadcasts over ``[B, heads, N]``."""
    return position if position.dim() == 1 else position[:, None]
