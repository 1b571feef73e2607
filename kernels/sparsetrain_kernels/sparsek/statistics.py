"""What a causal selection looks like, as a few numbers: cheap enough to log, and without synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.inputs import document_bounds
from sparsetrain_kernels.sparsek.causal_selection import CausalSelection

AGES = (1, 4)
"""Windows."""


@torch.no_grad()
def topk_statistics(
    scores: Tensor,
    selection: CausalSelection,
    topk: int,
    window: int,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means over the rows with more than ``topk`` candidates, and over the selected pairs of a row and a key.

    Args:
        scores: fp32 or fp64 ``[B, H, N]``.
        selection: what :func:`~sparsetrain_kernels.sparsek.causal_sparsek` made of them.
        topk, window, sinks, cu_seqlens: as they were there.

    Returns:
        Numbers without dimensions, fp64, NaN where there is nothing to take a mean of:

        - ``kept_mass``: the sum of the gates of the selected keys, over ``topk``, which is the sum of all. Near 0 the
          attention to selected keys vanishes.
        - ``support``: candidates with a gate above 0.
        - ``interior``: candidates with a gate between 0 and 1. Only these have a gradient: near 0 nothing is learned.
        - ``saturated``: candidates with a gate of 1, over ``topk``.
        - ``older_than_1_window``, ``older_than_4_windows``: of the selected pairs, those whose key left the window so
          many windows ago.
    """
    partial = selection.threshold > -float("inf")
    rows = partial.sum().double()
    saturated = selection.saturated_size.where(partial, 0).sum()
    interior = selection.interior_size.sum()

    # A key inside and selected counts in each row as its score less the row's threshold. It is selected at least until
    # it is inside: keys with a gate of 1 are never more than topk.
    start = selection.interior_start.long()
    end = selection.interior_end.minimum(selection.exit).long()
    thresholds = selection.threshold.double().where(partial, 0.0).cumsum(-1)
    thresholds = torch.nn.functional.pad(thresholds, (1, 0))
    inner = (scores.double() * (end - start)).sum() - (thresholds.gather(-1, end) - thresholds.gather(-1, start)).sum()

    first, last = document_bounds(scores.shape[2], cu_seqlens, scores.device)
    token = torch.arange(scores.shape[2], device=scores.device)
    competes = token >= first + sinks
    entry = (token + window).minimum(last)
    pairs = [((selection.exit - entry - age * window).clamp(min=0) * competes).sum().double() for age in (0, *AGES)]
    return {
        "kept_mass": (saturated + inner) / (topk * rows),
        "support": (saturated + interior) / rows,
        "interior": interior / rows,
        "saturated": saturated / (topk * rows),
        **{f"older_than_{age}_window{'s' * (age > 1)}": old / pairs[0] for age, old in zip(AGES, pairs[1:])},
    }
