"""FlashAttention 4: dense, and with the pattern as lists of blocks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from packaging.version import Version
from torch import Tensor

from sparsetrain.bench.contenders.base import TOKENS_FIRST, Contender, Prepared
from sparsetrain.bench.contenders.tiles import TILE, TileLists, tile_lists
from sparsetrain.bench.measure import MIB, Unavailable, once_ms, peak
from sparsetrain.bench.problem import PatternProblem, Tensors

SOUND_BLOCK_SPARSE = "4.0.0b36"
"""The first FlashAttention 4 whose block-sparse backward pass has no race that makes some gradients wrong."""


def flash_attn_cute() -> Any:
    """FlashAttention 4.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if not found:
        raise Unavailable("flash_attn.cute is not installed: pip install --pre flash-attn-4")
    return importlib.import_module("flash_attn.cute")


def block_sparse_flash_attn_cute() -> Any:
    """FlashAttention 4, for calls with lists of blocks.

    Raises:
        Unavailable: it is not installed, or its gradients have a race.
    """
    module = flash_attn_cute()
    installed = importlib.metadata.version("flash-attn-4")
    if Version(installed) < Version(SOUND_BLOCK_SPARSE):
        raise Unavailable(
            f"flash-attn-4 {installed} has a race in its block-sparse gradients; install {SOUND_BLOCK_SPARSE} or newer"
        )
    return module


def _output(result: Any) -> Tensor:
    """Some versions return the log-sum-exp along with it."""
    return result[0] if isinstance(result, tuple) else result


def _dense(problem: Any, tensors: Any) -> Prepared:
    flash_attn_func = flash_attn_cute().flash_attn_func
    return Prepared(lambda *inputs: _output(flash_attn_func(*inputs, causal=True)), TOKENS_FIRST)


def _blocks(problem: PatternProblem, tensors: Tensors) -> Prepared:
    """Its own causal mask, which it need not ask a function for, and lists no wider than the longest."""
    flash_attn_func = block_sparse_flash_attn_cute().flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    def build() -> tuple[TileLists, TileLists]:
        lists = tile_lists(problem.pattern, problem.length).to(problem.device)
        return lists, lists.by_key_tile()

    build()
    _, size = peak(build, problem.device)
    both, mask_ms = once_ms(build, problem.device)
    forward, backward = (BlockSparseTensorsTorch(*lists, block_size=(TILE, TILE)) for lists in both)
    options = {"causal": True, "block_sparse_tensors": forward, "block_sparse_tensors_bwd": backward}
    return Prepared(
        lambda *inputs: _output(flash_attn_func(*inputs, **options)),
        TOKENS_FIRST,
        mask_ms=mask_ms,
        mask_mib=None if size is None else size / MIB,
        note="causal=True, lists as wide as the longest",
    )


DENSE = Contender("fa4", "FA4, dense", "all", _dense, packed=(False,))
BLOCKS = Contender("fa4-blocks", "FA4, block lists", "blocks", _blocks, packed=(False,))
