"""What a causal selection looks like, as a few numbers: cheap enough to log, and without synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend
from sparsetrain_kernels.causal_selection.selection import CausalSelection
from sparsetrain_kernels.inputs import document_bounds

AGES = (1, 4)
"""Windows."""
NAMES = ("kept_mass", "support", "interior", "saturated", "older_than_1_window", "older_than_4_windows")


@torch.no_grad()
def topk_statistics(
    scores: Tensor,
    selection: CausalSelection,
    topk: int,
    window: int,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Statistics of a causal selection (2406.16747, section 3.2).

    Means over the rows with more than ``topk`` candidates, and over the selected pairs of a row and a key.

    Args:
        scores: ``[B, H, N]``, fp32 or fp64.
        selection: what :func:`~sparsetrain_kernels.causal_selection.causal_sparsek` made of them, ``[B, H, N]`` each.
        topk, window, sinks: as they were there.
        cu_seqlens: int32 ``[documents + 1]``, as it was there.
        backend: ``triton``, ``reference`` (plain PyTorch), or ``auto``: the first on CUDA where it can run.

    Returns:
        Numbers without dimensions, fp64 ``[]``, NaN where there is nothing to take a mean of:

        - ``kept_mass``: the sum of the gates of the selected keys, over ``topk``, which is the sum of all. Near 0 the
          attention to selected keys vanishes.
        - ``support``: candidates with a gate above 0.
        - ``interior``: candidates with a gate between 0 and 1. Only these have a gradient: near 0 nothing is learned.
        - ``saturated``: candidates with a gate of 1, over ``topk``.
        - ``older_than_1_window``, ``older_than_4_windows``: of the selected pairs, those whose key left the window so
          many windows ago.

    Raises:
        ValueError: the backend does not exist, or cannot run this.
    """
    refusals = {"gluon": "there is no Hopper version", "triton": None}
    if choose_backend(backend, scores, refusals) == "triton":
        # On first use: Triton may be absent.
        from sparsetrain_kernels.causal_selection.triton.statistics import launch_statistics

        found = launch_statistics(scores, selection, topk, window, sinks, cu_seqlens, AGES)
    else:
        found = _reference_statistics(scores, selection, topk, window, sinks, cu_seqlens)
    return dict(zip(NAMES, found, strict=True))


def _reference_statistics(
    scores: Tensor, selection: CausalSelection, topk: int, window: int, sinks: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
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
    return (
        (saturated + inner) / (topk * rows),
        (saturated + interior) / rows,
        interior / rows,
        saturated / (topk * rows),
        *(old / pairs[0] for old in pairs[1:]),
    )
