"""PowerAttention (2503.03588): a window, the sinks, and the blocks at distances 1, 2, 4, 8, ..."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sparsetrain.methods.static import StaticConfig
from sparsetrain.section import Blocks, BlocksOrNone

if TYPE_CHECKING:
    from sparsetrain.patterns import PowerPattern


class PowerConfig(StaticConfig):
    """Each block reads its window, the sinks, and the blocks at power-of-two distances (Algorithm 1).

    Each doubling of the length adds one block to read. After ``log2(blocks)`` layers, information from every token has
    reached the last block.
    """

    method: Literal["power"] = "power"
    """PowerAttention."""
    window: Blocks = 5
    """Blocks in the local window, including the query's own block."""
    sinks: BlocksOrNone = 1
    """Blocks at the start of each document that every query reads."""

    def pattern(self, num_kv_heads: int = 1) -> PowerPattern:
        """The paper's mask as block lists."""
        from sparsetrain.patterns import PowerPattern

        return PowerPattern(block=self.block, window=self.window, sinks=self.sinks)
