"""Static attention patterns as arithmetic on blocks of tokens: lists, density and receptive field, exactly.

A pattern says which key blocks each query block reads; inside the query's own block attention is causal, every other
listed block is read whole. Blocks are counted from the start of the sequence: block ``t`` holds the positions
``t * block`` to ``(t + 1) * block - 1``.
Definitions follow PowerAttention (arXiv 2503.03588, Algorithm 1, section 4.1 and appendix D).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import lcm
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def _check(name: str, value: int, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {at_least}")


def _check_distances(distances: tuple[int, ...]) -> None:
    for distance in distances:
        _check("distances", distance, 0)
    if distances[:1] != (0,) or list(distances) != sorted(set(distances)):
        raise ValueError(f"distances={distances!r} must ascend without repeats from 0, the own block")


@dataclass(frozen=True)
class Pattern(ABC):
    """A block pattern: the key blocks that each query block reads.

    Raises:
        ValueError: a parameter is out of range; the message names it and its value.
    """

    block: int
    """Tokens in a block."""

    def __post_init__(self) -> None:
        _check("block", self.block, 1)

    @property
    def per_head(self) -> bool:
        """Whether the KV heads have different lists."""
        return False

    @property
    def heads(self) -> range:
        """The KV heads whose lists differ."""
        return range(1)

    @property
    def num_sinks(self) -> int:
        """The first blocks of the sequence, which every query block reads."""
        return 0

    @property
    def by_head(self) -> tuple[Pattern, ...]:
        """Of each KV head a pattern of its own, where such patterns say the same; else empty."""
        return ()

    @property
    def by_layer(self) -> tuple[Pattern, ...]:
        """What the layers of a model take in turn: the pattern itself, where all take the same."""
        return (self,)

    @property
    def period(self) -> int:
        """But for the sinks, query blocks ``t`` and ``t + period`` read the same distances; 1 where all do."""
        return 1

    @abstractmethod
    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        """The key blocks that ``query_block`` reads: ascending, unique, up to and including ``query_block``."""

    @abstractmethod
    def query_blocks(self, key_block: int, num_blocks: int, head: int = 0) -> tuple[int, ...]:
        """The transposed list: the query blocks, of ``num_blocks``, that read ``key_block``. Ascending and unique."""

    def last_query_block(self, key_block: int, num_blocks: int | None) -> int | None:
        """The last query block, of ``num_blocks``, that reads ``key_block`` with any head. In a sequence without an end
        (``num_blocks`` None) that may be None: later blocks read it again and again."""
        if num_blocks is None:
            return None
        return max(self.query_blocks(key_block, num_blocks, head)[-1] for head in self.heads)

    @abstractmethod
    def listed(self, num_blocks: int, head: int = 0) -> int:
        """The total number of key blocks that the first ``num_blocks`` query blocks read, without listing them."""

    def max_key_blocks(self, num_blocks: int) -> int:
        """The longest list among the first ``num_blocks`` query blocks."""
        return max(len(self.key_blocks(t, head)) for head in self.heads for t in range(num_blocks))

    def mask(self, num_blocks: int, head: int = 0) -> np.ndarray:
        """The pattern as a bool matrix ``[num_blocks, num_blocks]``, queries by keys."""
        import numpy as np

        mask = np.zeros((num_blocks, num_blocks), dtype=bool)
        for t in range(num_blocks):
            mask[t, list(self.key_blocks(t, head))] = True
        return mask

    def token_mask(self, n_query: int, n_key: int, q_start: int | None = None, head: int = 0) -> np.ndarray:
        """Which keys each query sees, bool ``[n_query, n_key]``; the first query is at ``q_start`` (default: the last
        ``n_query`` positions)."""
        import numpy as np

        start = n_key - n_query if q_start is None else q_start
        query, key = np.arange(start, start + n_query)[:, None], np.arange(n_key)[None, :]
        last = max(start + n_query, n_key)
        return self.mask(-(-last // self.block), head)[query // self.block, key // self.block] & (key <= query)

    def density(self, length: int, head: int = 0) -> float:
        """The fraction of causal (query, key) token pairs of ``length`` tokens that is computed."""
        _check("length", length, 1)
        whole, rows = divmod(length - 1, self.block)  # the blocks before the last one, and its rows less one
        rows += 1
        before = self.listed(whole, head)
        last = self.listed(whole + 1, head) - before
        pairs = self.block**2 * (before - whole) + whole * (self.block * (self.block + 1) // 2)
        pairs += rows * self.block * (last - 1) + rows * (rows + 1) // 2
        return pairs / (length * (length + 1) // 2)

    def mean_density(self, length: int) -> float:
        """:meth:`density`, averaged over the heads and the layers."""
        return sum(self.density(length, head) for head in self.heads) / len(self.heads)

    def reach(self, num_blocks: int, num_layers: int, dense_layers: Collection[int] = ()) -> np.ndarray:
        """The blocks whose input the last block depends on after each layer, bool ``[num_layers, num_blocks]``.

        Residual connections keep what was reached, heads mix in the output projection, and from the first layer of
        ``dense_layers`` on everything is reached.
        """
        import numpy as np

        reach = np.zeros((num_layers, num_blocks), dtype=bool)
        first_reached = self._first_reached(num_blocks)
        for layer in range(num_layers):
            if layer in dense_layers:
                reach[layer:] = True
            elif layer < len(first_reached):
                reach[layer:, list(first_reached[layer])] = True
        return reach

    def receptive_field(self, num_blocks: int, num_layers: int, dense_layers: Collection[int] = ()) -> np.ndarray:
        """The share of blocks that reach the last block after each layer, float ``[num_layers]``."""
        return self.reach(num_blocks, num_layers, dense_layers).mean(axis=1)

    def layers_to_cover(self, num_blocks: int) -> int | None:
        """The number of layers after which the last block depends on every block; None if it never does."""
        first_reached = self._first_reached(num_blocks)
        return len(first_reached) if sum(map(len, first_reached)) == num_blocks else None

    def _first_reached(self, num_blocks: int) -> list[set[int]]:
        """The blocks on which the last of ``num_blocks`` blocks newly depends after the first, second, ... layer."""
        _check("num_blocks", num_blocks, 1)
        layers: list[set[int]] = []
        reached: set[int] = set()
        frontier = {num_blocks - 1}
        while len(reached) < num_blocks:
            frontier = {j for t in frontier for head in self.heads for j in self.key_blocks(t, head)} - reached
            if not frontier:
                break
            layers.append(frontier)
            reached |= frontier
        return layers


@dataclass(frozen=True)
class _OffsetPattern(Pattern):
    """A pattern made of block distances, the same for every query block, and of the first ``sinks`` blocks."""

    @abstractmethod
    def _spans(self, limit: int, head: int) -> Iterable[range]:
        """The block distances of KV head ``head`` below ``limit``, ascending from 0, the own block."""

    def _farthest(self) -> int | None:
        """The largest distance of any head; None where it grows with the sequence."""
        return None

    def last_query_block(self, key_block: int, num_blocks: int | None) -> int | None:
        farthest = self._farthest()
        if num_blocks is None:
            return None if key_block < self.num_sinks or farthest is None else key_block + farthest
        if key_block < self.num_sinks:
            return num_blocks - 1
        limit = num_blocks - key_block
        return key_block + max(span[-1] for head in self.heads for span in self._spans(limit, head) if span)

    def _offsets(self, limit: int, head: int) -> Iterable[int]:
        return chain.from_iterable(self._spans(limit, head))

    def listed(self, num_blocks: int, head: int = 0) -> int:
        sinks = min(self.num_sinks, num_blocks)
        # Every block reads the sinks up to itself; a distance is read by the blocks that lie so far behind the sinks.
        total = sinks * (sinks + 1) // 2 + (num_blocks - sinks) * sinks
        limit = num_blocks - self.num_sinks
        for span in self._spans(max(limit, 0), head):
            if span:
                total += len(span) * limit - len(span) * (span[0] + span[-1]) // 2
        return total

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        sinks = self.num_sinks
        offsets = tuple(self._offsets(max(query_block - sinks + 1, 0), head))
        return (*range(min(sinks, query_block + 1)), *(query_block - offset for offset in reversed(offsets)))

    def query_blocks(self, key_block: int, num_blocks: int, head: int = 0) -> tuple[int, ...]:
        if key_block < self.num_sinks:
            return tuple(range(key_block, num_blocks))
        return tuple(key_block + offset for offset in self._offsets(num_blocks - key_block, head))


@dataclass(frozen=True)
class FullPattern(_OffsetPattern):
    """Every earlier block: dense causal attention."""

    def _spans(self, limit: int, head: int) -> Iterable[range]:
        return (range(limit),)


@dataclass(frozen=True)
class SlidingPattern(_OffsetPattern):
    """The nearest ``window`` blocks and the first ``sinks`` blocks of the sequence (StreamingLLM's shape)."""

    window: int
    """Nearest blocks, the own one included."""
    sinks: int
    """First blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("window", self.window, 1)
        _check("sinks", self.sinks, 0)

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def _spans(self, limit: int, head: int) -> Iterable[range]:
        return (range(min(self.window, limit)), *self._far(limit))

    def _farthest(self) -> int | None:
        # Those that add far blocks add ever farther ones.
        return self.window - 1 if type(self) is SlidingPattern else None

    def _far(self, limit: int) -> Iterable[range]:
        """Distances of ``window`` or more, below ``limit``, ascending."""
        return ()


@dataclass(frozen=True)
class PowerPattern(SlidingPattern):
    """PowerAttention: a sliding window with sinks, and every block at a power-of-two distance.

    Every earlier block is reached within a number of layers logarithmic in the length (2503.03588, theorem B.1).
    """

    block: int = 256
    window: int = 5
    sinks: int = 1
    base: int = 2
    """Distances are ``d * base**k`` with ``d`` from 1 to ``base - 1``; the paper's base is 2."""
    farthest: int | None = None
    """No distance is larger, in blocks; None means that there is no such limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("base", self.base, 2)
        if self.farthest is not None:
            _check("farthest", self.farthest, self.window)

    def far_distances(self, limit: int) -> tuple[int, ...]:
        """The distances behind the window, below ``limit``, ascending."""
        return tuple(chain.from_iterable(self._far(limit)))

    def _farthest(self) -> int | None:
        return None if self.farthest is None else max(self.window - 1, *self.far_distances(self.farthest + 1))

    def _far(self, limit: int) -> Iterable[range]:
        end = limit if self.farthest is None else min(limit, self.farthest + 1)
        step = 1
        while step < end:
            yield range(-(-self.window // step) * step, min(step * self.base, end), step)
            step *= self.base


@dataclass(frozen=True)
class StridePattern(SlidingPattern):
    """A sliding window with sinks and every block at a multiple of ``stride`` (Sparse Transformer's strided shape)."""

    stride: int
    """Distance between the far blocks, in blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("stride", self.stride, 1)

    def _far(self, limit: int) -> Iterable[range]:
        return (range(-(-self.window // self.stride) * self.stride, limit, self.stride),)


@dataclass(frozen=True)
class DilatedPattern(_OffsetPattern):
    """``window`` blocks counted back from the own one, ``dilation`` apart (Longformer's dilated window)."""

    window: int
    """Blocks read, the own one included."""
    dilation: int
    """Distance between them, in blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("window", self.window, 1)
        _check("dilation", self.dilation, 1)

    def _spans(self, limit: int, head: int) -> Iterable[range]:
        return (range(0, min(self.window * self.dilation, limit), self.dilation),)

    def _farthest(self) -> int | None:
        return (self.window - 1) * self.dilation


@dataclass(frozen=True)
class DistancePattern(_OffsetPattern):
    """The blocks at the given distances, and the first ``sinks`` blocks of the sequence."""

    distances: tuple[int, ...]
    """Block distances, ascending; the first is 0, the own block."""
    sinks: int
    """First blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("sinks", self.sinks, 0)
        _check_distances(self.distances)

    @property
    def window(self) -> int:
        """Nearest blocks, the own one included."""
        return next(near for near, distance in enumerate((*self.distances, -1)) if near != distance)

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def _spans(self, limit: int, head: int) -> Iterable[range]:
        return (_one(distance) for distance in self.distances if distance < limit)

    def _farthest(self) -> int | None:
        return self.distances[-1]


@dataclass(frozen=True)
class HeadDistancePattern(_OffsetPattern):
    """The blocks at distances of each KV head's own, and the first ``sinks`` blocks of the sequence."""

    distances: tuple[tuple[int, ...], ...]
    """For each KV head, its block distances, ascending; the first is 0, the own block."""
    sinks: int
    """First blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("sinks", self.sinks, 0)
        if not self.distances:
            raise ValueError("distances=() must hold the distances of at least one KV head")
        for distances in self.distances:
            _check_distances(distances)

    @property
    def per_head(self) -> bool:
        return True

    @property
    def heads(self) -> range:
        return range(len(self.distances))

    @property
    def window(self) -> int:
        """Nearest blocks that every head reads, the own one included."""
        return min(DistancePattern(self.block, distances, 0).window for distances in self.distances)

    @property
    def by_head(self) -> tuple[Pattern, ...]:
        return tuple(DistancePattern(self.block, distances, self.sinks) for distances in self.distances)

    @property
    def num_sinks(self) -> int:
        return self.sinks

    def _spans(self, limit: int, head: int) -> Iterable[range]:
        return (_one(distance) for distance in self.distances[head] if distance < limit)

    def _farthest(self) -> int | None:
        return max(distances[-1] for distances in self.distances)


@dataclass(frozen=True)
class LongNetPattern(Pattern):
    """LongNet: segments of growing length at growing dilation, in blocks.

    A level ``(length, rate)`` connects two blocks of the same ``length``-aligned segment that are both multiples of
    ``rate``; with ``head_shift``, KV head ``h`` takes the blocks equal to ``h`` modulo ``rate`` instead.
    """

    segments: tuple[tuple[int, int], ...] = ((8, 1), (16, 2), (32, 4), (64, 8), (128, 16))
    """Levels ``(length, rate)``. One has rate 1, so that every block reads itself."""
    head_shift: bool = False
    """Shift the dilated blocks by head, as the original does; PowerAttention's baseline does not."""
    num_heads: int = 1
    """KV heads; they only differ with ``head_shift``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("num_heads", self.num_heads, 1)
        for length, rate in self.segments:
            _check("segments' length", length, 1)
            _check("segments' rate", rate, 1)
        if all(rate != 1 for _, rate in self.segments):
            raise ValueError(
                f"segments={self.segments!r} must hold a level of rate 1, so that every block reads itself"
            )

    @property
    def per_head(self) -> bool:
        return self.head_shift

    @property
    def heads(self) -> range:
        return range(self.num_heads if self.head_shift else 1)

    @property
    def period(self) -> int:
        return lcm(*(number for level in self.segments for number in level))

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        keys: set[int] = set()
        for length, rate, shift in self._levels(head):
            if query_block % rate == shift:
                segment = query_block - query_block % length
                keys.update(range(segment + (shift - segment) % rate, query_block + 1, rate))
        return tuple(sorted(keys))

    def listed(self, num_blocks: int, head: int = 0) -> int:
        return _listed(self, num_blocks, head)

    def query_blocks(self, key_block: int, num_blocks: int, head: int = 0) -> tuple[int, ...]:
        queries: set[int] = set()
        for length, rate, shift in self._levels(head):
            if key_block % rate == shift:
                segment_end = key_block - key_block % length + length
                queries.update(range(key_block, min(segment_end, num_blocks), rate))
        return tuple(sorted(queries))

    def last_query_block(self, key_block: int, num_blocks: int | None) -> int | None:
        longest = max(length for length, _ in self.segments)
        end = key_block + longest
        return super().last_query_block(key_block, end if num_blocks is None else min(num_blocks, end))

    def _levels(self, head: int) -> list[tuple[int, int, int]]:
        return [(length, rate, head % rate if self.head_shift else 0) for length, rate in self.segments]


def _one(distance: int) -> range:
    return range(distance, distance + 1)


@lru_cache(maxsize=256)
def _listed(pattern: LongNetPattern, num_blocks: int, head: int) -> int:
    """Every segment begins a multiple of the period behind a block that begins all, so the lists repeat from there."""
    periods, rest = divmod(num_blocks, pattern.period)
    total = sum(len(pattern.key_blocks(t, head)) for t in range(rest))
    if periods:
        total += periods * sum(len(pattern.key_blocks(t, head)) for t in range(pattern.period))
    return total
