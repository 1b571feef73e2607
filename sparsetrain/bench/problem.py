"""What is measured: one attention problem, its tensors, and the pairs of tokens it makes an implementation compute."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from sparsetrain_kernels import block_pattern_attention_dense
from torch import Tensor

from sparsetrain.patterns import PowerPattern

SHORTEST_DOCUMENT = 64
MEAN_DOCUMENT = 4096
BACKWARD_WORK = 2.5
"""Matrix products of a backward pass over those of a forward pass: five to two."""


class Tensors(NamedTuple):
    """The inputs of a problem and the gradient that arrives at its output; all ``[batch, heads, tokens, head_dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    scores: Tensor | None = None
    """What keys are selected by, fp32 ``[batch, kv_heads, tokens]``; None where nothing is selected."""


@dataclass(frozen=True)
class CausalProblem(ABC):
    """Causal attention at one length: what dense implementations know of a problem."""

    length: int
    """Tokens."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    documents: tuple[int, ...] | None = None
    """Lengths of the packed documents in tokens, or None for one sequence that is not packed."""

    def tensors(self, seed: int = 0) -> Tensors:
        """Normal random tensors, the same for every implementation."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(heads: int) -> Tensor:
            shape = (self.batch, heads, self.length, self.head_dim)
            return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

        return Tensors(normal(self.heads), normal(self.kv_heads), normal(self.kv_heads), normal(self.heads))

    def cu_seqlens(self) -> Tensor | None:
        """The bounds of the documents, int32 ``[documents + 1]``; None where nothing is packed."""
        if self.documents is None:
            return None
        bounds = torch.tensor([0, *self.documents]).cumsum(0)
        return bounds.to(self.device, torch.int32)

    def flops(self, sparse: bool) -> float:
        """Floating-point operations of a forward pass: two matrix products over the visible pairs of tokens."""
        pairs = sum(
            self.sparse_pairs(length) if sparse else length * length / 2 for length in self.documents or (self.length,)
        )
        return 4 * self.head_dim * pairs * self.heads * self.batch

    @abstractmethod
    def sparse_pairs(self, length: int) -> float:
        """(query, key) pairs that a sparse implementation computes in a document of ``length`` tokens."""

    @abstractmethod
    def definition(self, *inputs: Tensor) -> Tensor:
        """What a sparse implementation has to return, under the whole mask: for short lengths only.

        Args:
            inputs: query, key, value, and the scores where the problem has some.
        """


@dataclass(frozen=True)
class Problem(CausalProblem):
    """Attention under a block pattern."""

    pattern: PowerPattern = field(kw_only=True)

    def sparse_pairs(self, length: int) -> float:
        """The pairs of the pattern."""
        return visible_pairs(self.pattern, length)

    def definition(self, *inputs: Tensor) -> Tensor:
        """Attention under the mask of the pattern."""
        query, key, value = inputs
        return block_pattern_attention_dense(query, key, value, self.pattern, cu_seqlens=self.cu_seqlens())[0]


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
        drawn = int(random.lognormal(math.log(mean) - 0.5, 1.0))
        length = min(max(drawn, SHORTEST_DOCUMENT), left)
        # What is left would be too short to be a document of its own.
        length = left if left - length < SHORTEST_DOCUMENT else length
        lengths.append(length)
        left -= length
    return tuple(lengths)
