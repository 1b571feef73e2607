"""What the static patterns share: attention over lists of key blocks that depend on the positions alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Unpack

from sparsetrain.methods.base import Method, MethodConfig
from sparsetrain.section import Tokens

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions
    from torch import nn

    from sparsetrain.patterns import Pattern


class StaticConfig(MethodConfig):
    """A method whose visible blocks are known before training."""

    block: Tokens = 256
    """Tokens in a block. Blocks count from the start of each document; the paper uses 256 for every pattern."""

    @abstractmethod
    def pattern(self, num_kv_heads: int = 1) -> Pattern:
        """The blocks each query block reads."""

    def build(self, num_kv_heads: int = 1) -> StaticMethod:
        """The method that attends along :meth:`pattern`."""
        return StaticMethod(self.pattern(num_kv_heads))


class StaticMethod(Method):
    """Attends to the key blocks a :class:`~sparsetrain.patterns.Pattern` lists, and to no others."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def density(self, length: int) -> float:
        """Share of the causal pairs of ``length`` tokens that are attended, averaged over the heads."""
        return sum(self.pattern.density(length, head) for head in self.pattern.heads) / len(self.pattern.heads)

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
