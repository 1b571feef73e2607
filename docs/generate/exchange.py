"""The bytes in docs/sequence-parallel.md: what sharing a row takes by all-to-all (Ulysses), ring, and neighbours.

python docs/generate/exchange.py    # writes the table into the page; a test fails where it differs

Counted, not measured, are bytes that one rank receives in one forward pass through one layer of attention, in 16 bits;
in brackets, those from other nodes. `sparsetrain bench exchange` times the first and the last.

- **All-to-all**: queries, keys and values go to where their heads are attended, and outputs come back. With more ranks
  than key/value heads, each rank gets a copy of one.
- **Ring**: keys and values of every earlier rank pass by. The last rank needs them all.
- **Neighbours**: a rank fetches the key blocks that the pattern lists for its query blocks, counted one by one. With
  ``c`` blocks a rank, ``c`` a power of two, distances of ``c`` and more land on the ranks 1, 2, 4, ... before it, and
  smaller ones on the rank before it: ``log2(ranks)`` times ``c`` blocks, and the sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from marked import with_part

from sparsetrain.patterns import PowerPattern
from sparsetrain.recipe.heads import shares_heads

PAGE = Path(__file__).resolve().parents[1] / "sequence-parallel.md"
BEGIN, END = "<!-- begin of the bytes -->\n", "<!-- end of the bytes -->\n"
BYTES = 2
"""Bytes of a 16-bit element."""


@dataclass(frozen=True)
class Shape:
    """One layer of attention."""

    heads: int
    kv_heads: int
    head_dim: int

    def all_to_all(self, length: int, ranks: int, node: int) -> tuple[float, float] | None:
        """Bytes one rank receives, and how many of them from other nodes; None where the heads cannot be shared."""
        if not shares_heads(ranks, self.heads, self.kv_heads):
            return None
        held = length / ranks * (2 * self.heads + 2 * max(self.kv_heads, ranks)) * self.head_dim * BYTES
        return held * (ranks - 1) / ranks, held * max(0, ranks - node) / ranks

    def ring(self, length: int, ranks: int) -> float:
        """Bytes the last rank receives."""
        return length / ranks * (ranks - 1) * self.key_bytes

    def neighbours(self, length: int, ranks: int, node: int, pattern: PowerPattern) -> tuple[float, float]:
        """Bytes the busiest rank receives, and bytes from other nodes of the rank that is busiest with those."""
        each = length // pattern.block // ranks
        most, most_afar = 0, 0
        for rank in range(ranks):
            own = range(rank * each, (rank + 1) * each)
            needed = {key for query in own for key in pattern.key_blocks(query)} - set(own)
            most = max(most, len(needed))
            most_afar = max(most_afar, sum(key // each // node != rank // node for key in needed))
        return most * pattern.block * self.key_bytes, most_afar * pattern.block * self.key_bytes

    @property
    def key_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * BYTES


def table(shape: Shape, lengths: list[int], ranks: list[int], node: int, pattern: PowerPattern) -> str:
    """Markdown, in MiB; the last column is how much more the all-to-all receives than the neighbours' exchange."""
    lines = ["| tokens | ranks | all-to-all | ring | neighbours | all-to-all / neighbours |", "| ---: " * 6 + "|"]
    for length in lengths:
        for size in ranks:
            everyone = shape.all_to_all(length, size, node)
            near, near_afar = shape.neighbours(length, size, node, pattern)
            all_to_all = "-" if everyone is None else _mib(*everyone)
            ratio = "-" if everyone is None else f"{everyone[0] / near:.2f}"
            cells = (f"{length:,}", str(size), all_to_all, _mib(shape.ring(length, size)), _mib(near, near_afar), ratio)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mib(size: float, afar: float = 0.0) -> str:
    return f"{size / 2**20:,.0f}" + (f" ({afar / 2**20:,.0f})" if afar else "")


def page() -> str:
    """The page with its table."""
    shape = Shape(heads=32, kv_heads=8, head_dim=128)
    pattern = PowerPattern(block=256, window=5, sinks=1)
    counted = table(shape, [32768, 131072, 1048576], [2, 4, 8, 16, 32, 64], node=8, pattern=pattern)
    return with_part(PAGE, BEGIN, END, counted + "\n")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
