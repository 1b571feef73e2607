"""Dilated window, the Longformer baseline of 2503.03588 (4.1, appendix D)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sparsetrain.methods.static import StaticConfig
from sparsetrain.section import Blocks

if TYPE_CHECKING:
    from sparsetrain.patterns import DilatedPattern


class DilatedConfig(StaticConfig):
    """Each block reads ``window`` blocks that lie ``dilation`` apart; the blocks between them are never reached."""

    method: Literal["dilated"] = "dilated"
    """Dilated window."""
    window: Blocks = 10
    """Number of blocks read, including the query's own block."""
    dilation: Blocks = 2
    """Distance in blocks between neighbouring blocks that are read."""

    def pattern(self, num_kv_heads: int = 1) -> DilatedPattern:
        """The dilated window as block lists."""
        from sparsetrain.patterns import DilatedPattern

        return DilatedPattern(block=self.block, window=self.window, dilation=self.dilation)
