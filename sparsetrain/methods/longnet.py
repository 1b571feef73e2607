"""LongNet's dilated segments (2307.02486), as configured in 2503.03588 (appendix D), or with per-head shifts."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sparsetrain.methods.static import StaticConfig
from sparsetrain.section import Blocks

if TYPE_CHECKING:
    from sparsetrain.patterns import LongNetPattern

Segment = tuple[Blocks, Blocks]

MOST_LISTED = 2**22
"""Limit on the number of list entries over all blocks of one period of the pattern."""


class LongNetConfig(StaticConfig):
    """Within each aligned segment of ``length`` blocks, every ``rate``-th block reads every ``rate``-th block."""

    method: Literal["longnet"] = "longnet"
    """LongNet's dilated segments."""
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=16)] = (
        (8, 1),
        (16, 2),
        (32, 4),
        (64, 8),
        (128, 16),
    )
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

    @model_validator(mode="after")
    def _lists_fit(self) -> LongNetConfig:
        period = lcm(*(number for segment in self.segments for number in segment))
        listed = period * sum(-(-length // rate) for length, rate in self.segments)
        most = MOST_LISTED // 32 if self.head_shift else MOST_LISTED  # a list for each head
        if listed > most:
            raise ValueError(
                f"segments: the pattern repeats only every {period:,} blocks, which needs lists of {listed:,} blocks, "
                f"and the limit is {most:,}; choose shorter segments, or lengths and rates that divide one another"
            )
        return self

    def pattern(self, num_kv_heads: int = 1) -> LongNetPattern:
        """The segments as block lists, one list per head with ``head_shift``."""
        from sparsetrain.patterns import LongNetPattern

        return LongNetPattern(
            block=self.block, segments=self.segments, head_shift=self.head_shift, num_heads=num_kv_heads
        )

    def heads_fault(self, num_kv_heads: int, parallel: int) -> str | None:
        """See :meth:`MethodConfig.heads_fault`."""
        fault = super().heads_fault(num_kv_heads, parallel)
        return None if fault is None else f"{fault}, or attention.head_shift: false"
