"""The oracle of SparseK: its definition (2406.16747, section 3) in fp64, row by row, without the method's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.methods.base import Expected

CHECKED_ROWS = 32
"""Number of evenly spaced tokens of a document that are checked; each reads the whole document."""


def expected_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    document: slice,
    *,
    topk: int,
    window: int,
    sinks: int,
    gate: str,
    scale: float,
) -> Expected:
    """Compute candidates, threshold, gates, and attention over the selected keys.

    Args:
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.
        scores: ``[1, Hs, N]``, the layer's own: with other rounding, two close scores could swap ranks.
        document: The positions of the document in the row.

    Returns:
        The positions, and the output there: fp64 ``[1, Hq, R, D]``.
    """
    length = document.stop - document.start
    scores = scores[0, :, document].double()
    key, value = (tensor[0, :, document].double() for tensor in (key, value))
    tokens = torch.arange(length, device=query.device)
    checked = tokens[torch.linspace(0, length - 1, min(CHECKED_ROWS, length), device=query.device).long()]
    rows = [
        attended(query[0, :, document][:, row], key, value, scores, row, topk, window, sinks, gate=gate, scale=scale)
        for row in checked.tolist()
    ]
    return Expected(checked + document.start, torch.stack(rows, dim=1)[None])


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    row: int,
    topk: int,
    window: int,
    sinks: int,
    remembered: int | None = None,
    *,
    gate: str,
    scale: float,
) -> Tensor:
    """The output of the token at ``row``, ``[Hq, D]`` in fp64.

    Args:
        query: ``[Hq, D]``, its own.
        key, value: ``[Hkv, N, D]``.
        scores: ``[Hs, N]``.
        remembered: place the threshold by so many of the largest competing scores, as generation does.
    """
    scores, key, value = scores.double(), key.double(), value.double()
    tokens = torch.arange(scores.shape[1], device=query.device)
    always = (tokens < sinks) | (tokens > row - window)
    competes = ~always & (tokens <= row)
    counted = competes if remembered is None else largest(scores, competes, remembered)
    gates = torch.where(competes, _gates(scores, counted, topk), 1.0)
    seen = (tokens <= row) & (always | largest(scores, competes, topk))
    heads = query.double().unflatten(0, (key.shape[0], -1))
    logits = (heads @ key.mT) * scale + (gates.log()[:, None] if gate == "log" else 0.0)
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    if gate == "value":
        weights = weights * gates[:, None]
    return (weights @ value).flatten(0, 1)


def _gates(scores: Tensor, competes: Tensor, topk: int) -> Tensor:
    """``clip(u - tau, 0, 1)``, with the tau at which the competing gates sum to ``topk``, found by bisection."""
    if int(competes.sum(-1).max()) <= topk:
        return torch.ones_like(scores)
    low, high = scores.amin(-1, keepdim=True) - 1.0, scores.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        over = ((scores - middle).clamp(0.0, 1.0) * competes).sum(-1, keepdim=True) > topk
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (scores - (low + high) / 2).clamp(0.0, 1.0)


def largest(scores: Tensor, competes: Tensor, topk: int) -> Tensor:
    """A bool mask ``[..., N]`` of the ``topk`` largest of the ``scores`` ``[..., N]`` admitted by ``competes``.

    Of equal scores the newer token is selected.
    """
    newest_first = scores.masked_fill(~competes, float("-inf")).flip(-1)
    rank = newest_first.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).flip(-1)
    return competes & (rank < topk)
