"""LongNet's dilated segments (2307.02486), as configured in 2503.03588 (appendix D) or with its per-head shifts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from sparsetrain.methods.static import StaticConfig

if TYPE_CHECKING:
    from sparsetrain.patterns import LongNetPattern

Segment = tuple[PositiveInt, PositiveInt]


class LongNetConfig(StaticConfig):
    """Within each aligned segment of ``length`` blocks, every ``rate``-th block reads every ``rate``-th block."""

    method: Literal["longnet"] = "longnet"
    """LongNet's dilated segments."""
    segments: Annotated[tuple[Segment, ...], Field(min_length=1)] = ((8, 1), (16, 2), (32, 4), (64, 8), (128, 16))
    """Pairs of segment length in blocks and dilation rate, one of them with rate 1; a block reads their union."""
    head_shift: bool = False
    """Give each key/value head its own offset within the dilation, as LongNet does; the paper's baseline has none."""

    @field_validator("segments")
    @classmethod
    def _rate_fits(cls, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        for length, rate in segments:
            if rate > length:
                raise ValueError(f"segment [{length}, {rate}]: the rate may not exceed the segment's length in blocks")
        if all(rate > 1 for _, rate in segments):
            raise ValueError("one segment needs rate 1, so that every block reads itself")
        return segments

    def pattern(self, num_kv_heads: int = 1) -> LongNetPattern:
        """The segments as block lists, one list a head with ``head_shift``."""
        from sparsetrain.patterns import LongNetPattern

        return LongNetPattern(
            block=self.block, segments=self.segments, head_shift=self.head_shift, num_heads=num_kv_heads
        )
