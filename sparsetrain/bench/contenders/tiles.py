"""A pattern as lists of tiles of 128 x 128 tokens, which is how other implementations take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.bench.measure import Unavailable
from sparsetrain.patterns import Pattern

TILE = 128
"""Tokens along a side, of queries and keys alike."""


class TileLists(NamedTuple):
    """int32; how many tiles each row of tiles lists, ``[1, 1, tiles]``, and which, ``[1, 1, tiles, width]``, as wide as
    the longest list."""

    partial_counts: Tensor
    partial: Tensor
    """The diagonal tiles, which need the causal mask."""
    full_counts: Tensor
    full: Tensor

    def to(self, device: torch.device) -> TileLists:
        """The lists on a device."""
        return TileLists(*(each.to(device) for each in self))

    def by_key_tile(self) -> TileLists:
        """For each tile of keys the tiles of queries that read it, in ascending order."""
        counts, full = self.full_counts[0, 0], self.full[0, 0]
        tiles, width = full.shape
        is_listed = torch.arange(width, device=full.device) < counts[:, None]
        keys, order = full[is_listed].sort(stable=True)
        queries = is_listed.nonzero()[order, 0]
        counts = torch.bincount(keys, minlength=tiles)
        place = torch.arange(len(keys), device=full.device) - (counts.cumsum(0) - counts)[keys]
        read_by = torch.zeros(tiles, max(int(counts.max()), 1), dtype=torch.int32, device=full.device)
        read_by[keys.long(), place] = queries.int()
        return self._replace(full_counts=counts.int()[None, None], full=read_by[None, None])


def tile_lists(pattern: Pattern, length: int) -> TileLists:
    """The tiles of keys that each tile of queries reads. No mask is looked at.

    Raises:
        Unavailable: a block is not made of whole tiles.
    """
    if pattern.block % TILE:
        raise Unavailable(f"the tiles of others are {TILE} tokens; a block of {pattern.block} is not made of them")
    tiles, ratio = -(-length // TILE), pattern.block // TILE
    rows: list[Tensor] = []
    for t in range(-(-tiles // ratio)):
        earlier = torch.tensor(pattern.key_blocks(t)[:-1], dtype=torch.int32)
        whole = (earlier[:, None] * ratio + torch.arange(ratio, dtype=torch.int32)).flatten()
        for row in range(t * ratio, min((t + 1) * ratio, tiles)):
            rows.append(torch.cat([whole, torch.arange(t * ratio, row, dtype=torch.int32)]))
    counts = torch.tensor([len(listed) for listed in rows], dtype=torch.int32)
    full = torch.zeros(tiles, max(int(counts.max()), 1), dtype=torch.int32)
    for row, listed in enumerate(rows):
        full[row, : len(listed)] = listed
    partial = torch.arange(tiles, dtype=torch.int32)[:, None]
    return TileLists(torch.ones_like(counts)[None, None], partial[None, None], counts[None, None], full[None, None])
