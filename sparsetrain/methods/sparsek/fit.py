"""Fit a scorer to the dense attention that keys receive, by ridge regression in closed form."""

from __future__ import annotations

from typing import Unpack

import torch
from sparsetrain_kernels.inputs import AttentionOptions
from sparsetrain_kernels.score_placement import document_positions
from torch import Tensor

from sparsetrain.errors import ModelError
from sparsetrain.methods.fit import LayerFit
from sparsetrain.methods.sparsek.scorer import SparseKScorer

MIN_ROWS = 32
"""Keys that fewer queries read from beyond their window are left out of the fit."""

TILE_LOGITS = 1 << 26
"""Number of logits computed at once."""

RIDGE = 1e-2
"""Regularisation, relative to the mean variance of an input."""


class SparseKFit(LayerFit):
    """The normal equations of one layer, summed over batches.

    A key's target is the logarithm of the attention it receives from beyond its window, relative to uniform attention:
    the mean over those queries of its weight times the number of keys the query sees, averaged over the query heads
    that share a selection. With this score a key is kept as long as it is read.

    Args:
        scorer: The scorer of the layer.
        window, sinks: As in :class:`~sparsetrain.methods.sparsek.method.SparseKConfig`.
    """

    def __init__(self, scorer: SparseKScorer, window: int, sinks: int) -> None:
        self.scorer, self.window, self.sinks = scorer, window, sinks
        self.count = 0
        self._sums: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[AttentionOptions]
    ) -> None:
        """See :meth:`LayerFit.add`."""
        scale, cu_seqlens = options.get("scale") or query.shape[-1] ** -0.5, options.get("cu_seqlens")
        mass, rows = received_attention(query, key, self.scorer.heads, self.window, scale, cu_seqlens)
        position = document_positions(query.shape[2], cu_seqlens, query.device).position
        usable = (rows >= MIN_ROWS) & (position >= self.sinks)
        x = hidden[:, usable].flatten(0, 1).double()
        y = mass[:, :, usable].clamp(min=1e-6).log().double().transpose(1, 2).flatten(0, 1)
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        self._sums = new if self._sums is None else tuple(a + b for a, b in zip(self._sums, new))  # type: ignore[assignment]
        self.count += x.shape[0]

    @torch.no_grad()
    def finish(self) -> None:
        """Write the solution into the scorer.

        Raises:
            ModelError: No document was sufficiently longer than the window.
        """
        if self._sums is None or self.count == 0:
            raise ModelError(
                f"no document in the batches is long enough beyond attention.window={self.window} to show which "
                "distant keys are read; use longer documents"
            )
        sum_x, sum_y, xx, xy = (total / self.count for total in self._sums)
        covariance = xx - sum_x[:, None] * sum_x
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        self.scorer.weight.copy_(torch.linalg.solve(covariance, xy - sum_x[:, None] * sum_y).T)
        self.scorer.ready = True


def received_attention(
    query: Tensor, key: Tensor, heads: int, window: int, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The attention that each key receives from beyond its window, relative to uniform attention.

    It is computed in tiles of queries, so memory is linear in N.

    Returns:
        Mean over those queries ``[B, heads, N]``, fp32 (1 for uniform attention), and their number ``[N]``.
    """
    batch, query_heads, length, _ = query.shape
    position, first = document_positions(length, cu_seqlens, query.device)
    assert first is not None
    row = torch.arange(length, device=query.device)
    grouped = query.unflatten(1, (key.shape[1], -1))
    received = torch.zeros(batch, heads, length, dtype=torch.float32, device=query.device)
    rows = torch.zeros(length, dtype=torch.int64, device=query.device)
    tile = max(1, TILE_LOGITS // (batch * query_heads * length))
    for start in range(0, length, tile):
        own = slice(start, start + tile)
        seen = (row <= row[own, None]) & (row >= first[own, None])
        far = seen & (row <= row[own, None] - window)
        logits = grouped[:, :, :, own].float() @ key[:, :, None].float().transpose(-1, -2) * scale
        weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        relative = weights * (position[own, None] + 1) * far
        received += relative.sum(dim=-2).flatten(1, 2).unflatten(1, (heads, -1)).mean(dim=2)
        rows += far.sum(dim=0)
    return received / rows.clamp(min=1), rows
