"""The base of static patterns: attention over lists of key blocks that depend only on positions."""

from __future__ import annotations

from abc import abstractmethod
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Unpack

from sparsetrain.methods.base import Expected, Method, MethodConfig
from sparsetrain.methods.costs import NO_PARAMETERS, AttentionCosts, AttentionRate, LayerShape
from sparsetrain.methods.dense_oracle import expected_at_the_start
from sparsetrain.section import Tokens

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions
    from torch import nn

    from sparsetrain.patterns import Pattern

# Measured on one H200 in bf16, 2026-11-24 and 2026-11-29, by the commands in docs/performance.md.
HOPPER_RATE = AttentionRate(forward=(578e12, 430e12), backward=(439e12, 384e12))
"""Block patterns with our Hopper kernels at 131,072 tokens: heads of 128 9.99 ms forward, 32.6 backward; of 64 6.71
forward, 25.5 both."""

TRITON_RATE = AttentionRate(forward=(374e12, 278e12), backward=(279e12, 255e12))
"""The plain Triton kernels on the same problem: 15.4 ms forward, 66.5 both; heads of 64 scaled as HOPPER_RATE."""

BYTES = 32.0
"""Bytes per token and query head: 128 MiB for 131,072 tokens of 32 heads, at every length."""

HOPPER_SUMS = (4.0, 2.0**31)
"""Bytes per query element that the Hopper kernels need to accumulate gradients in backward (head dim 128), and the
maximum in total."""


class StaticConfig(MethodConfig):
    """A method whose visible blocks are known before training."""

    block: Tokens = 256
    """Tokens in a block. Blocks count from the start of each document; the paper uses 256 for every pattern."""

    @abstractmethod
    def pattern(self, num_kv_heads: int = 1) -> Pattern:
        """The block pattern: the key blocks that each query block reads."""

    def build(self, num_kv_heads: int = 1) -> StaticMethod:
        """The method object for :meth:`pattern`."""
        return StaticMethod(self.pattern(num_kv_heads))

    def costs(self, shape: LayerShape) -> AttentionCosts:
        """The costs of the block pattern kernels, which do not depend on the pattern; density is counted separately."""
        each, most = HOPPER_SUMS
        sums = 0.0
        if shape.hopper and shape.head_dim == 128:
            sums = min(each * shape.heads * shape.head_dim, most / shape.tokens)
        rate = HOPPER_RATE if shape.hopper else TRITON_RATE
        return AttentionCosts(rate, BYTES * shape.heads + sums, 0.0, False, NO_PARAMETERS)


class StaticMethod(Method):
    """Attends to the key blocks a :class:`~sparsetrain.patterns.Pattern` lists, and to no others."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def density(self, length: int) -> float:
        """The fraction of the causal pairs of ``length`` tokens that is attended, averaged over heads and layers."""
        return self.pattern.mean_density(length)

    def of_layer(self, position: int) -> StaticMethod:
        """See :meth:`Method.of_layer`."""
        patterns = self.pattern.by_layer
        if len(patterns) == 1:
            return self
        own = copy(self)
        own.pattern = patterns[position % len(patterns)]
        return own

    def keys_read(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rows: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.keys_read`, bool ``[H, R, N]``: the listed blocks up to the token itself."""
        import torch

        pattern, length = self.pattern, key.shape[2]
        blocks = torch.zeros(len(pattern.heads), len(rows), -(-length // pattern.block), dtype=torch.bool)
        for head in pattern.heads:
            for index, row in enumerate(rows.tolist()):
                blocks[head, index, list(pattern.key_blocks(row // pattern.block, head))] = True
        seen = blocks.to(key.device).repeat_interleave(pattern.block, dim=-1)[..., :length]
        return seen & (torch.arange(length, device=key.device) <= rows[:, None])

    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """See :meth:`Method.attend`."""
        from sparsetrain_kernels.block_pattern import block_pattern_attention

        return block_pattern_attention(query, key, value, self.pattern, **options)

    def expected(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        document: slice,
        **options: Unpack[AttentionOptions],
    ) -> Expected:
        """See :meth:`Method.expected`: the pattern as a mask, at the first tokens of the document.

        ``query`` ``[1, Hq, N, D]``; ``key``, ``value`` ``[1, Hkv, N, D]``; fp64 output ``[1, Hq, R, D]``.
        """
        from sparsetrain_kernels import block_pattern_attention_dense

        return expected_at_the_start(
            partial(block_pattern_attention_dense, pattern=self.pattern), query, key, value, document, options
        )
