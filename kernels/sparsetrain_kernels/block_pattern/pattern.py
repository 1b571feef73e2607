"""What the operation asks of a pattern."""

from __future__ import annotations

from typing import Protocol


class BlockPattern(Protocol):
    """Which blocks of keys each block of queries reads. Hashable: index tensors are cached by pattern."""

    @property
    def block(self) -> int:
        """Tokens in a block. Block ``t`` of a document holds its positions ``t * block`` to ``(t + 1) * block - 1``."""

    @property
    def per_head(self) -> bool:
        """Whether the KV heads have different lists."""

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        """Key blocks of ``query_block`` for KV head ``head``: ascending, unique, none later, itself included."""

    def __hash__(self) -> int: ...
