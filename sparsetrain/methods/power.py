"""PowerAttention (2503.03588): a window, the sinks, and the blocks at distances 1, 2, 4, 8, ...; and its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sparsetrain.methods.static import StaticConfig
from sparsetrain.section import Blocks, BlocksOrNone

if TYPE_CHECKING:
    from sparsetrain.patterns import Pattern, PowerPattern


class PowerConfig(StaticConfig):
    """Each block reads its window, the sinks, and the blocks at power-of-two distances (Algorithm 1).

    Each doubling of the length adds one block to read. After ``log2(blocks)`` layers, information from every token has
    reached the last block.
    """

    added_fields: ClassVar[frozenset[str]] = frozenset({"base", "farthest", "split"})

    method: Literal["power"] = "power"
    """PowerAttention."""
    window: Blocks = 5
    """Blocks in the local window, including the query's own block."""
    sinks: BlocksOrNone = 1
    """Blocks at the start of each document that every query reads."""
    base: Annotated[int, Field(ge=2, le=64)] = 2
    """The further blocks lie at distances ``d * base**k``, ``d`` from 1 to ``base - 1``. 2 is the paper's; with 4 more
    blocks are read, and about half as many layers reach everything."""
    farthest: Blocks | None = None
    """The largest distance, in blocks; null for no limit. With one, generation keeps a ring of so many blocks."""
    split: Literal["none", "layers", "heads"] = "none"
    """Who reads which of the further blocks. ``none``: every layer and head all of them, as the paper has it.
    ``layers``: each layer those at one distance, the next layer those at the next, in turn. ``heads``: the key/value
    heads of a layer share the distances out. Both need ``farthest``, and keep less in generation."""

    @model_validator(mode="after")
    def _distances_are_there(self) -> PowerConfig:
        if self.farthest is None:
            if self.split != "none":
                raise ValueError(
                    f"split={self.split} needs farthest, the largest distance in blocks: take half of the blocks of "
                    "the longest text (farthest: 64 for 32,768 tokens in blocks of 256)"
                )
        elif self.farthest < self.window or not self._whole().far_distances(self.farthest + 1):
            raise ValueError(
                f"farthest={self.farthest} leaves no block to read behind a window of {self.window}: raise it, or take "
                "attention.method: sliding"
            )
        return self

    def pattern(self, num_kv_heads: int = 1) -> Pattern:
        """The paper's mask as block lists, or its parts by layer or head."""
        from sparsetrain.layered_pattern import LayeredPattern
        from sparsetrain.patterns import DistancePattern, HeadDistancePattern

        whole = self._whole()
        if self.split == "none" or self.farthest is None:
            return whole
        near, far = tuple(range(self.window)), whole.far_distances(self.farthest + 1)
        if self.split == "layers":
            patterns = (DistancePattern(self.block, (*near, distance), self.sinks) for distance in far)
            return LayeredPattern(self.block, tuple(patterns))
        # Neighbours share a part where there are more heads than distances: their keys are kept together.
        parts = min(num_kv_heads, len(far))
        by_head = ((*near, *far[head * parts // num_kv_heads :: parts]) for head in range(num_kv_heads))
        return HeadDistancePattern(self.block, tuple(by_head), self.sinks)

    def heads_fault(self, num_kv_heads: int, parallel: int) -> str | None:
        """See :meth:`MethodConfig.heads_fault`."""
        fault = super().heads_fault(num_kv_heads, parallel)
        return None if fault is None else f"{fault}, or attention.split: layers"

    def _whole(self) -> PowerPattern:
        from sparsetrain.patterns import PowerPattern

        return PowerPattern(self.block, self.window, self.sinks, self.base, self.farthest)
