"""Launches the statistics of a selection. Nothing is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.causal_selection.selection import CausalSelection
from sparsetrain_kernels.causal_selection.triton import statistics_kernels as kernels
from sparsetrain_kernels.documents import known_bounds
from sparsetrain_kernels.inputs import row_major
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device

BLOCK = 1024
"""Rows or keys that a program takes at a time."""
PARTS = 256
"""Programs, at most."""


def launch_statistics(
    scores: Tensor,
    selection: CausalSelection,
    topk: int,
    window: int,
    sinks: int,
    cu_seqlens: Tensor | None,
    ages: tuple[int, int],
) -> tuple[Tensor, ...]:
    """The numbers of :func:`~sparsetrain_kernels.causal_selection.topk_statistics` in their order."""
    scores, threshold, *integers = row_major(scores, *selection)
    total, tokens, device = scores.numel(), scores.shape[2], scores.device
    parts = min(PARTS, next_power_of_2(cdiv(total, BLOCK)))
    sums = torch.empty((7, parts), dtype=torch.float64, device=device)
    means = torch.empty(6, dtype=torch.float64, device=device)
    start, end = (None, None) if cu_seqlens is None else known_bounds(tokens, cu_seqlens, device)
    nan, infinity = float("nan"), float("inf")
    full = threshold.nan_to_num(nan=nan, posinf=infinity, neginf=0.0)
    with on_device(scores):
        launch(
            kernels.statistics_sums_kernel,
            parts,
            (scores, threshold, full.cumsum(-1, dtype=torch.float64), *integers, start, end, sums),
            (total, tokens, window, sinks),
            AGE_1=ages[0],
            AGE_2=ages[1],
            PARTS=parts,
            PACKED=cu_seqlens is not None,
            BLOCK=BLOCK,
        )
        launch(kernels.statistics_means_kernel, 1, (sums, means), (topk,), PARTS=parts)
    return means.unbind()
