"""Stride slash, the Sparse Transformer baseline of 2503.03588 (4.1, appendix D)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sparsetrain.methods.static import StaticConfig
from sparsetrain.section import Blocks, BlocksOrNone

if TYPE_CHECKING:
    from sparsetrain.patterns import StridePattern


class StrideConfig(StaticConfig):
    """Each block reads its window, the sinks, and every ``stride``-th block before it."""

    method: Literal["stride"] = "stride"
    """Strided slash."""
    window: Blocks = 6
    """Blocks in the local window, including the query's own block."""
    sinks: BlocksOrNone = 1
    """Blocks at the start of each document that every query reads."""
    stride: Blocks = 32
    """Distance in blocks between the diagonals: the blocks at distance ``stride``, ``2 * stride``, ... are read."""

    def pattern(self, num_kv_heads: int = 1) -> StridePattern:
        """The window, the diagonals and the sinks as block lists."""
        from sparsetrain.patterns import StridePattern

        return StridePattern(block=self.block, window=self.window, sinks=self.sinks, stride=self.stride)
