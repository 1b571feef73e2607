"""The ruler pattern: far blocks are kept as the marks of a ruler are spaced, and a block that is dropped stays dropped.

PowerAttention (2503.03588) reads blocks at fixed distances, so that every block is read again and again. Here a block
is read for a time that its own number sets, and never again after it: the cache grows with the logarithm of the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sparsetrain.methods.static import StaticConfig
from sparsetrain.patterns import Pattern
from sparsetrain.section import Blocks, BlocksOrNone

MOST_LEVELS = 10
"""The lists repeat only after ``2**levels`` blocks, and are given to the kernels as numbers."""


@dataclass(frozen=True)
class RulerPattern(Pattern):
    """A window, sinks, and of the blocks before them those whose time has not ended.

    Block ``j`` is read by the ``keep * 2**m`` blocks after it, ``m`` being how often 2 divides ``j + 1``, ``levels`` at
    most: so every second block is kept twice as long as its neighbours, every fourth four times as long.
    """

    window: int
    """Nearest blocks, the own one included."""
    sinks: int
    """First blocks."""
    keep: int
    """Blocks after it by which a block is read whose ``m`` is 0."""
    levels: int
    """The largest ``m``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("window", 1), ("sinks", 0), ("keep", 1), ("levels", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")

    @property
    def num_sinks(self) -> int:
        return self.sinks

    @property
    def period(self) -> int:
        return 1 << self.levels

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        end = query_block + 1
        blocks = {*range(min(self.sinks, end)), *range(max(0, end - self.window), end)}
        for level in range(self.levels + 1):
            step = 1 << level
            # Those of a higher level are kept longer still.
            first = -(-max(end - self.keep * step, 1) // step) * step
            blocks.update(range(first - 1, end, step))
        return tuple(sorted(blocks))

    def query_blocks(self, key_block: int, num_blocks: int, head: int = 0) -> tuple[int, ...]:
        last = self.last_query_block(key_block, num_blocks)
        return tuple(range(key_block, num_blocks if last is None else last + 1))

    def last_query_block(self, key_block: int, num_blocks: int | None) -> int | None:
        if key_block < self.sinks:
            return None if num_blocks is None else num_blocks - 1
        number = key_block + 1
        level = min((number & -number).bit_length() - 1, self.levels)
        last = key_block + self._kept(level)
        return last if num_blocks is None else min(last, num_blocks - 1)

    def listed(self, num_blocks: int, head: int = 0) -> int:
        total = 0
        for level, blocks in self._blocks_by_level(num_blocks):
            kept = self._kept(level)
            total += len(blocks) * (kept + 1)
            # Those near the end are read by fewer blocks than that.
            cut = blocks[max(0, -(-(num_blocks - kept - blocks.start) // blocks.step)) :]
            if cut:
                total -= len(cut) * (cut[0] + cut[-1]) // 2 - len(cut) * (num_blocks - 1 - kept)
        for sink in range(min(self.sinks, num_blocks)):
            number = sink + 1
            kept = self._kept(min((number & -number).bit_length() - 1, self.levels))
            total += num_blocks - 1 - min(sink + kept, num_blocks - 1)
        return total

    def _kept(self, level: int) -> int:
        """Blocks after a block of a level by which it is read."""
        return max(self.window - 1, self.keep << level)

    def _blocks_by_level(self, num_blocks: int) -> Iterator[tuple[int, range]]:
        for level in range(self.levels):
            yield level, range((1 << level) - 1, num_blocks, 2 << level)
        yield self.levels, range((1 << self.levels) - 1, num_blocks, 1 << self.levels)


class RulerConfig(StaticConfig):
    """Each block reads its window, the sinks, and the further blocks whose time has not ended: a cache that grows with
    the logarithm of the length, whatever comes.

    As many blocks are read as with ``power``, and every token is reached in as many layers.
    """

    method: Literal["ruler"] = "ruler"
    """A window, and further blocks like the marks of a ruler."""
    window: Blocks = 5
    """Blocks in the local window, including the query's own block."""
    sinks: BlocksOrNone = 1
    """Blocks at the start of each document that every query reads."""
    keep: Annotated[int, Field(ge=1, le=1024)] = 2
    """Block ``j`` is read by the ``keep * 2**m`` blocks after it, ``2**m`` being the largest power of two that divides
    ``j + 1``. With 3 about half as many blocks more are read, and fewer layers reach everything."""
    levels: Annotated[int, Field(ge=0, le=MOST_LEVELS)] = 7
    """The largest ``m``. With 7, texts of up to 512 blocks are covered in as many layers as with ``power``; in longer
    ones, each further layer adds ``keep * 2**levels`` blocks. Each level doubles the lists that the kernels get."""

    def pattern(self, num_kv_heads: int = 1) -> RulerPattern:
        """The marks as block lists."""
        return RulerPattern(self.block, self.window, self.sinks, self.keep, self.levels)
