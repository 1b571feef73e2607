"""SparseK attention at one length: its scores, the pairs of tokens it computes, and its definition (2406.16747, 3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from sparsetrain_kernels import selected_attention_dense, sparsek_threshold
from torch import Tensor

from sparsetrain.bench.problem import CausalProblem, Tensors
from sparsetrain.methods.sparsek import SparseKConfig

DEVIATION = 0.7
"""Standard deviation of the scores. The width of a gate's slope is 1: some gates lie at 0 and 1, most in between."""
SLOPE = SparseKConfig().slope
"""What scores gain for every position with ``drift``, in standard deviations: the method's default."""


@dataclass(frozen=True)
class SparseKProblem(CausalProblem):
    """A window, the first tokens, and the ``topk`` other earlier tokens with the largest scores."""

    topk: int = field(kw_only=True)
    window: int = field(kw_only=True)
    sinks: int = field(kw_only=True)
    gate: str = field(kw_only=True)
    drift: bool = field(kw_only=True)
    """Newer tokens have larger scores; otherwise the scores of all tokens are alike, and selected keys lie anywhere."""

    def tensors(self, seed: int = 0) -> Tensors:
        """Normal random tensors and scores, the same for every implementation."""
        generator = torch.Generator(self.device).manual_seed(seed + 1)
        shape = (self.batch, self.kv_heads, self.length)
        scores = torch.randn(shape, device=self.device, generator=generator)
        if self.drift:
            scores += SLOPE * torch.arange(self.length, device=self.device)
        return super().tensors(seed)._replace(scores=DEVIATION * scores)

    def sparse_pairs(self, length: int) -> float:
        """The token at position i reads ``min(i + 1, sinks + topk + window)`` keys."""
        keys = self.sinks + self.topk + self.window
        growing = min(length, keys)
        return growing * (growing + 1) / 2 + (length - growing) * keys

    def definition(self, *inputs: Tensor) -> Tensor:
        """Attention under the mask and the gates of a selection that was made by sorting, row by row."""
        query, key, value, scores = inputs
        found = [select_by_sorting(each, self.topk, self.window, self.sinks) for each in scores.flatten(0, 1)]
        threshold, exit = (torch.stack(each).view(scores.shape) for each in zip(*found, strict=True))
        out, _ = selected_attention_dense(
            query,
            key,
            value,
            scores,
            threshold,
            exit,
            topk=self.topk,
            window=self.window,
            sinks=self.sinks,
            gate=self.gate,
        )
        return out


def select_by_sorting(scores: Tensor, topk: int, window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """The selection of one head, each row's by itself, over an ``N x N`` table of candidates.

    Args:
        scores: fp32 or fp64 ``[N]``.

    Returns:
        Threshold ``[N]`` of each row, differentiable, and int32 ``[N]``, the row in which each key leaves.
    """
    length = scores.shape[0]
    key = torch.arange(length, device=scores.device)
    row = key[:, None]
    candidates = (key >= sinks) & (key <= row - window)
    exact = scores.detach().double().expand(length, length)
    tau = sparsek_threshold(exact, topk, mask=candidates)

    # Newest first, so that a stable sort puts the newer of two equal scores before the older.
    newest_first = exact.masked_fill(~candidates, -torch.inf).flip(1)
    ranked = length - 1 - newest_first.sort(dim=1, descending=True, stable=True).indices
    selected = torch.zeros_like(candidates).scatter_(1, ranked[:, :topk], True) & candidates
    exit = torch.where(key < sinks, length, (key + window).clamp(max=length) + selected.sum(0))

    gates = exact - tau[:, None]
    interior = (candidates & (gates > 0) & (gates < 1)).to(scores.dtype)
    mean = interior @ scores / interior.sum(1).clamp_min(1)
    return tau.to(scores.dtype) + (mean - mean.detach()), exit.to(torch.int32)
