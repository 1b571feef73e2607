"""The pattern as FlexAttention's block masks: fed from the lists, or built from a predicate for packed documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparsetrain.bench.problem import Problem
from sparsetrain.bench.timing import Unavailable
from sparsetrain.patterns import Pattern, PowerPattern

TILE = 128
"""Tokens along a side of FlexAttention's blocks, for queries and keys alike."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class TileLists(NamedTuple):
    """int32; how many tiles each row of tiles reads, ``[1, 1, tiles]``, and which, ``[1, 1, tiles, tiles]``."""

    partial_counts: Tensor
    partial: Tensor
    """The diagonal tiles, which need the causal mask."""
    full_counts: Tensor
    full: Tensor


def tile_lists(pattern: Pattern, length: int) -> TileLists:
    """The pattern's lists in tiles of 128 x 128 tokens. No mask is looked at.

    Raises:
        Unavailable: a block is not made of whole tiles.
    """
    if pattern.block % TILE:
        raise Unavailable(f"FlexAttention's tiles are {TILE} tokens; a block of {pattern.block} is not made of them")
    tiles, ratio = -(-length // TILE), pattern.block // TILE
    counts = torch.zeros(tiles, dtype=torch.int32)
    # As wide as there are tiles, for from_kv_blocks takes the number of key tiles from here.
    full = torch.zeros(tiles, tiles, dtype=torch.int32)
    for t in range(-(-tiles // ratio)):
        earlier = torch.tensor(pattern.key_blocks(t)[:-1], dtype=torch.int32)
        whole = (earlier[:, None] * ratio + torch.arange(ratio, dtype=torch.int32)).flatten()
        for row in range(t * ratio, min((t + 1) * ratio, tiles)):
            listed = torch.cat([whole, torch.arange(t * ratio, row, dtype=torch.int32)])
            counts[row] = len(listed)
            full[row, : len(listed)] = listed
    partial = torch.zeros(tiles, tiles, dtype=torch.int32)
    partial[:, 0] = torch.arange(tiles)
    return TileLists(torch.ones_like(counts)[None, None], partial[None, None], counts[None, None], full[None, None])


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask of a diagonal tile, and of every tile of the lists."""
    return query >= key


def listed_block_mask(pattern: Pattern, length: int, device: torch.device) -> BlockMask:
    """The pattern's block mask for one sequence, from its lists."""
    lists = tile_lists(pattern, length)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=lists.partial_counts.to(device),
        kv_indices=lists.partial.to(device),
        full_kv_num_blocks=lists.full_counts.to(device),
        full_kv_indices=lists.full.to(device),
        BLOCK_SIZE=TILE,
        mask_mod=causal,
        seq_lengths=(length, length),
    )


def document_mask(pattern: PowerPattern, documents: tuple[int, ...], device: torch.device) -> MaskMod:
    """PowerAttention's predicate within packed documents: blocks count from each document's start."""
    block, window, sinks = pattern.block, pattern.window, pattern.sinks
    lengths = torch.tensor(documents, device=device)
    # The start of a document also tells it from the others.
    start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).to(torch.int32)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        key_block = (key - start[key]) // block
        distance = (query - start[query]) // block - key_block
        power_of_two = (distance & (distance - 1)) == 0
        listed = (distance < window) | (key_block < sinks) | power_of_two
        return (start[query] == start[key]) & (query >= key) & listed

    return visible


def document_block_mask(problem: Problem, create: Callable[..., BlockMask]) -> BlockMask:
    """The pattern's block mask for packed documents, from the predicate.

    Args:
        create: ``create_block_mask``; uncompiled it evaluates the whole mask at once.
    """
    assert problem.documents is not None
    visible = document_mask(problem.pattern, problem.documents, problem.device)
    return create(visible, None, None, problem.length, problem.length, problem.device, TILE)
