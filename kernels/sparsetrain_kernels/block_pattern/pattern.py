"""What the operation asks of a pattern, and the same pattern as the data that kernels read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch

from sparsetrain_kernels.gather import TileLists
from sparsetrain_kernels.inputs import Document

UNBOUNDED = 2**30
"""A window, or a distance, that no sequence reaches."""

MIN_CAPACITY = 2**10
"""Distances below this many blocks are listed whatever the length, so that lists rarely depend on it."""


class BlockPattern(TileLists, Protocol):
    """Which blocks of keys each block of queries reads. Hashable: its lists are cached. Under ``torch.compile``, a
    dataclass of numbers and tuples of them.

    But for the sinks, the list of a query block is a set of distances that depends on nothing, or on the query block
    modulo ``period`` (and ends at the first block).
    """

    @property
    def heads(self) -> range:
        """The KV heads that have lists. Read only where their lists differ."""

    @property
    def num_sinks(self) -> int:
        """The first blocks of a document, which every query block reads."""

    @property
    def period(self) -> int:
        """Query blocks ``t`` and ``t + period`` have the same distances; 1 where all have."""


class BlockLists(NamedTuple):
    """A pattern as numbers. Query block ``t`` reads the sinks, the ``window`` nearest blocks, and the blocks at the far
    distances of its phase ``t % period``; sinks are never listed twice."""

    block: int
    window: int
    """Nearest blocks that every list holds, the own one included; :data:`UNBOUNDED` where it holds all."""
    num_sinks: int
    heads: int
    """1, or the KV heads where their lists differ."""
    period: int
    far: tuple[int, ...]
    """``[heads, period, width]`` distances of at least ``window`` from a query block back to the keys it reads,
    ascending, then :data:`UNBOUNDED` to the width."""
    far_back: tuple[int, ...]
    """The transpose, ``[heads, period, width]``: distances from a key block of a phase to its queries."""

    @property
    def per_head(self) -> bool:
        return self.heads > 1

    @property
    def width(self) -> int:
        """Slots of a far list: a power of two, of at least 16."""
        return len(self.far) // (self.heads * self.period)

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        sinks = min(self.num_sinks, query_block + 1)
        start = ((head if self.per_head else 0) * self.period + query_block % self.period) * self.width
        far = [d for d in self.far[start : start + self.width] if d <= query_block - self.num_sinks]
        window = range(max(sinks, query_block - self.window + 1), query_block + 1)
        return (*range(sinks), *(query_block - d for d in reversed(far)), *window)

    def visible_pairs(self, document: Document) -> int:
        """Pairs of a query and a key that it sees, over all ``heads``."""
        _, rows, position, _ = document
        pairs = 0
        for t in range(position // self.block, (position + rows - 1) // self.block + 1):
            first, end = max(t * self.block, position), min((t + 1) * self.block, position + rows)
            listed = sum(len(self.key_blocks(t, head)) - 1 for head in range(self.heads))
            own = (end * (end + 1) - first * (first + 1)) // 2 - t * self.block * (end - first)
            pairs += (end - first) * self.block * listed + self.heads * own
        return pairs


def block_lists(pattern: BlockPattern, num_blocks: int, kv_heads: int) -> BlockLists:
    """The lists of ``pattern`` for sequences of up to ``num_blocks`` blocks.

    Raises:
        ValueError: the pattern has lists of its own for each of another number of KV heads.
    """
    heads = len(pattern.heads) if pattern.per_head else 1
    if pattern.per_head and kv_heads != heads:
        raise ValueError(f"pattern has lists for {heads} KV heads, but key has {kv_heads}: {pattern!r}")
    capacity = MIN_CAPACITY
    while capacity < num_blocks:
        capacity *= 2
    if torch.compiler.is_dynamo_compiling():
        kind: Any = type(pattern)
        parameters = tuple(_settled(getattr(pattern, name)) for name in kind.__match_args__)
        return BlockLists._make(_lists_of_dataclass(kind, parameters, capacity, heads))
    return _block_lists(pattern, capacity, heads)


def _settled(value: Any) -> Any:
    """The value, where Dynamo may have made its numbers symbolic: it settles what becomes a ``range``."""
    if isinstance(value, tuple):
        return tuple(_settled(part) for part in value)
    return range(value).stop if isinstance(value, int) and not isinstance(value, bool) else value


@torch.compiler.assume_constant_result
def _lists_of_dataclass(kind: Any, parameters: tuple[Any, ...], capacity: int, heads: int) -> tuple[Any, ...]:
    """What Dynamo calls while it traces, with plain numbers: of a pattern that a traced function makes it would hand
    over a shell without its fields, and of any other it would guard the identity. Plain too is what it returns: torch
    2.11 cannot unpack a named tuple that came out of a call like this one."""
    return tuple(_block_lists(kind(*parameters), capacity, heads))


@lru_cache(maxsize=64)
def _block_lists(pattern: BlockPattern, capacity: int, heads: int) -> BlockLists:
    sinks, period = pattern.num_sinks, pattern.period
    # Late enough that no distance below the capacity is cut off by the sinks, and a multiple of the period.
    base = -(-(capacity + sinks) // period) * period
    distances = [
        {t - j for j in pattern.key_blocks(t, head) if j >= sinks and t - j < capacity}
        for head in range(heads)
        for t in range(base, base + period)
    ]
    window = min(next(d for d in range(capacity + 1) if d not in listed) for listed in distances)
    forward = [sorted(d for d in listed if d >= window) for listed in distances]
    backward: list[list[int]] = [[] for _ in distances]
    for index, listed in enumerate(forward):
        head, phase = divmod(index, period)
        for distance in listed:
            backward[head * period + (phase - distance) % period].append(distance)
    width = 16
    while width < max(map(len, forward + backward)):
        width *= 2

    def table(lists: list[list[int]]) -> tuple[int, ...]:
        return tuple(d for far in lists for d in (*sorted(far), *[UNBOUNDED] * (width - len(far))))

    whole = window if window < capacity else UNBOUNDED
    return BlockLists(pattern.block, whole, sinks, heads, period, table(forward), table(backward))
