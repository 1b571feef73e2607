"""FlexAttention with the pattern as its block mask: from the lists, or from a predicate for packed documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.contenders.fa4 import block_sparse_flash_attn_cute
from sparsetrain.bench.contenders.tiles import TILE, tile_lists
from sparsetrain.bench.measure import MIB, Unavailable, once_ms, peak
from sparsetrain.bench.problem import PatternProblem, Tensors
from sparsetrain.patterns import Pattern, PowerPattern

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The causal mask, for FlexAttention's ``mask_mod``: int32 scalars ``[]`` to a bool scalar."""
    return query >= key


def listed_block_mask(pattern: Pattern, length: int, device: torch.device) -> BlockMask:
    """The pattern's block mask for one sequence, from its lists."""
    lists = tile_lists(pattern, length)

    def square(tiles: Tensor) -> Tensor:
        """As wide as there are tiles, which is where ``from_kv_blocks`` takes the number of key tiles from."""
        return F.pad(tiles, (0, tiles.shape[2] - tiles.shape[3])).to(device)

    return BlockMask.from_kv_blocks(
        kv_num_blocks=lists.partial_counts.to(device),
        kv_indices=square(lists.partial),
        full_kv_num_blocks=lists.full_counts.to(device),
        full_kv_indices=square(lists.full),
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
    block_sparse_flash_attn_cute()
    return _flex(problem, tensors, {"BACKEND": "FLASH"})


def _flex_tma(problem: PatternProblem, tensors: Tensors) -> Prepared:
    templates = files("torch._inductor.kernel.flex") / "templates"
    having = [
        name
        for name, file in (("forward", "flex_attention.py.jinja"), ("backward", "flex_backwards.py.jinja"))
        if "USE_TMA" in (templates / file).read_text()
    ]
    if not having:
        raise Unavailable(f"FlexAttention of torch {torch.__version__} does not load by TMA; it does from 2.9 on")
    prepared = _flex(problem, tensors, {"USE_TMA": True})
    return replace(prepared, note=f"{prepared.note}; TMA {' and '.join(having)}")


FLEX = (
    Contender("flex", "Flex, Triton", "blocks", _flex),
    Contender("flex-tma", "Flex, Triton, TMA", "blocks", _flex_tma),
    Contender("flex-flash", "Flex, FLASH (FA4)", "blocks", _flex_flash),
)
