"""FlexAttention with the pattern as its block mask: from the lists, or from a predicate for packed documents."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.contenders.dense import flash_attn_cute
from sparsetrain.bench.measure import MIB, Unavailable, once_ms, peak
from sparsetrain.bench.problem import PatternProblem, Tensors
from sparsetrain.patterns import Pattern, PowerPattern

TILE = 128
"""Tokens along a side of FlexAttention's blocks, for queries and keys alike."""
SOUND_BLOCK_SPARSE = "4.0.0b36"
"""The first FlashAttention 4 whose block-sparse backward pass has no race that makes some gradients wrong."""

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
    """The causal mask, for FlexAttention's ``mask_mod``: int32 scalars ``[]`` to a bool scalar."""
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


def document_block_mask(problem: PatternProblem, create: Callable[..., BlockMask]) -> BlockMask:
    """The pattern's block mask for packed documents, from the predicate.

    Args:
        create: ``create_block_mask``; uncompiled it evaluates the whole mask at once.
    """
    assert problem.documents is not None
    visible = document_mask(problem.pattern, problem.documents, problem.device)
    return create(visible, None, None, problem.length, problem.length, problem.device, TILE)


def _flex(problem: PatternProblem, tensors: Tensors, kernel_options: dict[str, Any] | None = None) -> Prepared:
    """FlexAttention, compiled for this problem's shapes alone."""
    # Every shape is a compilation of its own, and dynamo gives up after a few of one function.
    torch._dynamo.reset()
    note, create = "mask from the lists", create_block_mask
    if problem.documents is not None:
        note, create = "mask by compiled create_block_mask", torch.compile(create_block_mask, dynamic=False)

    def build() -> BlockMask:
        if problem.documents is None:
            return listed_block_mask(problem.pattern, problem.length, problem.device)
        return document_block_mask(problem, create)

    build()  # compiles
    mask, size = peak(build, problem.device)
    mask, mask_ms = once_ms(build, problem.device)
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=kernel_options)

    return Prepared(attend, mask_ms=mask_ms, mask_mib=None if size is None else size / MIB, note=note)


def _flex_flash(problem: PatternProblem, tensors: Tensors) -> Prepared:
    from packaging.version import Version

    flash_attn_cute()
    installed = importlib.metadata.version("flash-attn-4")
    if Version(installed) < Version(SOUND_BLOCK_SPARSE):
        raise Unavailable(
            f"flash-attn-4 {installed} has a race in its block-sparse gradients; install {SOUND_BLOCK_SPARSE} or newer"
        )
    return _flex(problem, tensors, {"BACKEND": "FLASH"})


FLEX = (
    Contender("flex", "Flex, Triton", "blocks", _flex),
    Contender("flex-flash", "Flex, FLASH (FA4)", "blocks", _flex_flash),
)
