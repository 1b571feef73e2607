"""Patterns that the layers of a model take in turn: which blocks reach which over layers that differ."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from sparsetrain.patterns import Pattern

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class LayeredPattern(Pattern):
    """A cycle of patterns. Of the layers that attend by it, the first takes the first pattern, the next one the next.

    It answers what concerns a whole model: density, reach. What one layer reads is asked of its own pattern, in
    :attr:`by_layer`.

    Raises:
        ValueError: there is no pattern, or they have blocks of different sizes.
    """

    patterns: tuple[Pattern, ...]
    """In the order of the layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.patterns or any(pattern.block != self.block for pattern in self.patterns):
            raise ValueError(f"patterns={self.patterns!r} must be at least one, all in blocks of {self.block}")

    @property
    def by_layer(self) -> tuple[Pattern, ...]:
        return self.patterns

    @property
    def per_head(self) -> bool:
        return any(pattern.per_head for pattern in self.patterns)

    @property
    def num_sinks(self) -> int:
        return max(pattern.num_sinks for pattern in self.patterns)

    def key_blocks(self, query_block: int, head: int = 0) -> NoReturn:
        """Not known without the layer.

        Raises:
            TypeError: always.
        """
        self._ask_the_layer()

    def query_blocks(self, key_block: int, num_blocks: int, head: int = 0) -> NoReturn:
        """Not known without the layer.

        Raises:
            TypeError: always.
        """
        self._ask_the_layer()

    def listed(self, num_blocks: int, head: int = 0) -> NoReturn:
        """Not known without the layer.

        Raises:
            TypeError: always.
        """
        self._ask_the_layer()

    def max_key_blocks(self, num_blocks: int) -> int:
        """See :meth:`Pattern.max_key_blocks`: the longest list of any layer."""
        return max(pattern.max_key_blocks(num_blocks) for pattern in self.patterns)

    def mean_density(self, length: int) -> float:
        """See :meth:`Pattern.mean_density`."""
        return sum(pattern.mean_density(length) for pattern in self.patterns) / len(self.patterns)

    def reach(self, num_blocks: int, num_layers: int, dense_layers: Collection[int] = ()) -> np.ndarray:
        """See :meth:`Pattern.reach`."""
        import numpy as np

        reach = np.zeros((num_layers, num_blocks), dtype=bool)
        for layer in range(num_layers):
            if layer in dense_layers or reach[layer - 1].all():
                reach[layer:] = True
                break
            reach[layer, list(self._reached(num_blocks, layer))] = True
        return reach

    def layers_to_cover(self, num_blocks: int) -> int | None:
        """See :meth:`Pattern.layers_to_cover`."""
        before = 0
        for layer in range(num_blocks * len(self.patterns)):
            reached = len(self._reached(num_blocks, layer))
            if reached == num_blocks:
                return layer + 1
            # What a whole turn of the cycle does not add, no other will.
            if layer % len(self.patterns) == 0:
                if reached == before:
                    return None
                before = reached
        return None

    def _reached(self, num_blocks: int, layer: int) -> set[int]:
        """The blocks whose input the last block depends on after a layer, read from that layer down to the first."""
        reached = {num_blocks - 1}
        for below in range(layer, -1, -1):
            pattern = self.patterns[below % len(self.patterns)]
            reached = {j for t in reached for head in pattern.heads for j in pattern.key_blocks(t, head)}
        return reached

    def _ask_the_layer(self) -> NoReturn:
        raise TypeError(f"layers read different blocks; ask one of by_layer: {self!r}")
