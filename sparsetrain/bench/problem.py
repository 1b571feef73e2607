"""Attention problems for benchmarks: their tensors, and the pairs of tokens that an implementation computes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from sparsetrain_kernels import block_pattern_attention_dense, selected_attention_dense, sparsek_threshold
from torch import Tensor

from sparsetrain.methods.recycled.costs import share_of_pairs
from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.methods.sparsek.oracle import largest
from sparsetrain.patterns import PowerPattern

SHORTEST_DOCUMENT = 64
MEAN_DOCUMENT = 4096
DEVIATION = 0.7
"""Standard deviation of the scores. The width of a gate's slope is 1: some gates lie at 0 and 1, most in between."""
SLOPE = SparseKConfig().slope
"""Increase of scores per position with ``drift``, in standard deviations: the method's default."""


class Tensors(NamedTuple):
    """The inputs of a problem and the gradient of its output; all ``[batch, heads, tokens, head_dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    scores: Tensor | None = None
    """Scores for the selection of keys, fp32 ``[batch, kv_heads, tokens]``; None without a selection."""


@dataclass(frozen=True)
class Shape:
    """Attention of one shape at one length."""

    length: int
    """Tokens."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    batch: int = 1

    def generator(self, seed: int) -> torch.Generator:
        """A source of random numbers: the same for every implementation."""
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, generator: torch.Generator, heads: int, tokens: int) -> Tensor:
        """``[batch, heads, tokens, head_dim]``."""
        shape = (self.batch, heads, tokens, self.head_dim)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

    def normal_scores(self, seed: int) -> Tensor:
        """fp32 ``[batch, kv_heads, tokens]``, before they are multiplied by the deviation."""
        shape = (self.batch, self.kv_heads, self.length)
        return torch.randn(shape, device=self.device, generator=self.generator(seed))


@dataclass(frozen=True)
class CausalProblem(Shape, ABC):
    """Causal attention: what dense implementations know of a problem."""

    documents: tuple[int, ...] | None = None
    """Lengths of the packed documents in tokens, or None for one sequence that is not packed."""

    def tensors(self, seed: int = 0) -> Tensors:
        """Normal random tensors."""
        generator, kv_heads = self.generator(seed), self.kv_heads
        return Tensors(*(self.normal(generator, n, self.length) for n in (self.heads, kv_heads, kv_heads, self.heads)))

    def cu_seqlens(self) -> Tensor | None:
        """The bounds of the documents, int32 ``[documents + 1]``; None where nothing is packed."""
        if self.documents is None:
            return None
        return torch.tensor([0, *self.documents]).cumsum(0).to(self.device, torch.int32)

    def flops(self, sparse: bool) -> float:
        """Floating-point operations of a forward pass: two matrix products over the visible pairs of tokens."""
        lengths = self.documents or (self.length,)
        pairs = sum(self.sparse_pairs(length) if sparse else length * length / 2 for length in lengths)
        return 4 * self.head_dim * pairs * self.heads * self.batch

    @abstractmethod
    def sparse_pairs(self, length: int) -> float:
        """(query, key) pairs that a sparse implementation computes in a document of ``length`` tokens."""

    @abstractmethod
    def definition(self, *inputs: Tensor) -> Tensor:
        """The reference output ``[batch, heads, tokens, head_dim]``, computed with the full mask (short lengths only).

        Args:
            inputs: Query ``[batch, heads, tokens, head_dim]``, key and value ``[batch, kv_heads, tokens, head_dim]``,
                and the scores ``[batch, kv_heads, tokens]`` if the problem has them.
        """


@dataclass(frozen=True)
class PatternProblem(CausalProblem):
    """Attention under a block pattern."""

    pattern: PowerPattern = field(kw_only=True)

    def sparse_pairs(self, length: int) -> float:
        """The pairs of the pattern."""
        return visible_pairs(self.pattern, length)

    def definition(self, *inputs: Tensor) -> Tensor:
        """See :meth:`CausalProblem.definition`: attention with the mask of the pattern."""
        query, key, value = inputs
        return block_pattern_attention_dense(query, key, value, self.pattern, cu_seqlens=self.cu_seqlens())[0]


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
        """Scores too."""
        scores = self.normal_scores(seed + 1)
        if self.drift:
            scores += SLOPE * torch.arange(self.length, device=self.device)
        return super().tensors(seed)._replace(scores=DEVIATION * scores)

    def sparse_pairs(self, length: int) -> float:
        """The token at position i reads ``min(i + 1, sinks + topk + window)`` keys."""
        keys = self.sinks + self.topk + self.window
        growing = min(length, keys)
        return growing * (growing + 1) / 2 + (length - growing) * keys

    def definition(self, *inputs: Tensor) -> Tensor:
        """See :meth:`CausalProblem.definition`: attention with the mask and gates of a selection by sorting."""
        query, key, value, scores = inputs
        keys: dict[str, Any] = {"topk": self.topk, "window": self.window, "sinks": self.sinks}
        found = [select_by_sorting(each, **keys) for each in scores.flatten(0, 1)]
        threshold, exit = (torch.stack(each).view(scores.shape) for each in zip(*found, strict=True))
        return selected_attention_dense(query, key, value, scores, threshold, exit, gate=self.gate, **keys)[0]


@dataclass(frozen=True)
class RecycledProblem(CausalProblem):
    """Every ``every``-th row reads all earlier keys and chooses ``keep`` of them for the rows up to the next."""

    every: int = field(kw_only=True)
    keep: int = field(kw_only=True)
    sinks: int = field(kw_only=True)
    recent: int = field(kw_only=True)

    def sparse_pairs(self, length: int) -> float:
        """All keys of the rows that choose; the keys of a choice, and those since, of the others."""
        share = share_of_pairs(length, self.every, self.keep + self.sinks + self.recent)
        return share * length * (length + 1) / 2

    def definition(self, *inputs: Tensor) -> Tensor:
        """See :meth:`CausalProblem.definition`: attention with a mask of choices by sorting (2411.05787, 3)."""
        query, key, value = inputs
        groups = (key.shape[1], query.shape[1] // key.shape[1])
        logits = query.unflatten(1, groups) @ key[:, :, None].mT * self.head_dim**-0.5
        place = torch.arange(self.length, device=query.device)
        causal = place <= place[:, None]
        seen = causal.expand(self.batch, groups[0], -1, -1).clone()
        weights = logits.detach().masked_fill(~causal, -math.inf).log_softmax(-1).amax(2).clamp(min=-6e4).half()
        for start in range(0, self.length, self.every):
            own = weights[:, :, start, : start + 1].float()
            pooled = torch.nn.functional.max_pool1d(own, 7, 1, 3)
            free = (place[: start + 1] >= self.sinks) & (place[: start + 1] <= start - self.recent)
            competes = free.expand(*own.shape)
            chosen = largest(pooled, competes, self.keep) | ~free
            seen[:, :, start + 1 : start + self.every, : start + 1] = chosen[:, :, None]
        weights = logits.masked_fill(~seen[:, :, None], -math.inf).softmax(-1)
        return (weights @ value[:, :, None]).flatten(1, 2)


def select_by_sorting(scores: Tensor, topk: int, window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """The selection of one head, each row's by itself, over an ``N x N`` table of candidates (2406.16747, 3).

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

    selected = largest(exact, candidates, topk)
    exit = torch.where(key < sinks, length, (key + window).clamp(max=length) + selected.sum(0))

    gates = exact - tau[:, None]
    interior = (candidates & (gates > 0) & (gates < 1)).to(scores.dtype)
    mean = interior @ scores / interior.sum(1).clamp_min(1)
    return tau.to(scores.dtype) + (mean - mean.detach()), exit.to(torch.int32)


def visible_pairs(pattern: PowerPattern, length: int) -> float:
    """(query, key) pairs that the pattern lets a sequence see, the diagonal blocks counted as half of a square.

    Where ``length`` is a multiple of 128 this is the number of visible 128 x 128 tiles, a diagonal one as a half.
    """
    pairs = 0.0
    for t in range(-(-length // pattern.block)):
        rows = min(pattern.block, length - t * pattern.block)
        pairs += rows * pattern.block * (len(pattern.key_blocks(t)) - 1) + rows * rows / 2
    return pairs


def document_lengths(total: int, *, mean: int = MEAN_DOCUMENT, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths that fill ``total`` tokens: of mean ``mean`` before they are cut to 64 to ``total`` tokens.

    The standard deviation of their logarithm is 1: a few long documents hold most of the tokens, as in real text.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    lengths: list[int] = []
    left = total
    while left:
        length = min(max(int(random.lognormal(math.log(mean) - 0.5, 1.0)), SHORTEST_DOCUMENT), left)
        # What is left would be too short to be a document of its own.
        length = left if left - length < SHORTEST_DOCUMENT else length
        lengths.append(length)
        left -= length
    return tuple(lengths)
