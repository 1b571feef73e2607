"""Sliding window with sinks, the StreamingLLM baseline of 2503.03588 (4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sparsetrain.methods.static import StaticConfig
from sparsetrain.section import Blocks, BlocksOrNone

if TYPE_CHECKING:
    from sparsetrain.patterns import SlidingPattern


class SlidingConfig(StaticConfig):
    """Each block reads its window and the sinks; information moves at most ``window - 1`` blocks per layer."""

    method: Literal["sliding"] = "sliding"
    """Sliding window with sinks."""
    window: Blocks = 9
    """Blocks in the local window, including the query's own block."""
    sinks: BlocksOrNone = 1
    """Blocks at the start of each document that every query reads."""

    def pattern(self, num_kv_heads: int = 1) -> SlidingPattern:
        """The window and the sinks as block lists."""
        from sparsetrain.patterns import SlidingPattern

        return SlidingPattern(block=self.block, window=self.window, sinks=self.sinks)
