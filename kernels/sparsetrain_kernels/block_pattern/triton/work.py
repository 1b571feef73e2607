"""What the launches of both kernel families share: work items, pattern tables, row statistics, partial sums.

Everything follows from shapes; nothing here reads a tensor on the host.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.block_pattern.triton.before_after import (
    block_pattern_bwd_stats_kernel,
    block_pattern_bwd_sum_kernel,
)
from sparsetrain_kernels.block_pattern.triton.geometry import ITEM, SCAN, work_items_kernel
from sparsetrain_kernels.documents import from_documents
from sparsetrain_kernels.inputs import AttentionInputs
from sparsetrain_kernels.launching import launch, pad_head_dim, stream_of

CHUNK_TOKENS = 4096
"""Query tokens that one program of a split sink column takes, as many as an ordinary column has to do."""
MAX_CHUNKS = 64
"""Chunks of the longest sink column: bounds the partial sums, whatever the length."""


class RowStats(NamedTuple):
    """What backward needs of each query row."""

    delta: Tensor
    """fp32 ``[B, Hq, N]``: the sum of ``grad_out * out``, less the gradient of the log-sum-exp."""
    padded_lse: Tensor
    """fp32 ``[B, Hq, R]``: the log-sum-exp in units of log2, in whole blocks of ``pad_block`` rows."""
    padded_delta: Tensor
    """fp32 ``[B, Hq, R]``: delta, laid out like it."""
    pad_block: int


def chunk_blocks(tokens: int, lists: BlockLists) -> int:
    """Query blocks of a chunk of a sink column; 0, no splitting, without sinks."""
    if not lists.num_sinks:
        return 0
    block = lists.block
    return max(CHUNK_TOKENS, 1 << (-(-tokens // MAX_CHUNKS) - 1).bit_length()) // block or 1


def work_items(
    call: AttentionInputs, lists: BlockLists, tokens: int, length: int, q_start: int, tile: int, chunk: int
) -> tuple[Tensor, int]:
    """The work items of a kernel over tiles of ``tile`` rows, and how many places are for split sink tiles.

    ``length`` is where an unpacked row ends and ``tokens`` what packed ones hold. The places are an upper bound that
    follows from the shapes.
    """
    packed = call.cu_seqlens is not None
    block, per_block = lists.block, -(-lists.block // tile)
    documents = call.cu_seqlens.shape[0] - 1 if call.cu_seqlens is not None else 1
    whole = (
        tokens // tile + documents
        if packed and block % tile == 0
        else per_block * ((length - q_start // block * block) // block + documents)
    )
    split = 0
    if chunk and tokens > chunk * block:
        chunks = 3 * tokens // (chunk * block) if packed else -(-length // (block * chunk))
        split = lists.num_sinks * per_block * chunks
    sizes = (documents, length, q_start, lists.num_sinks, split, split + whole, chunk)
    device = call.query.device

    def write() -> Tensor:
        return _write_items(call.cu_seqlens, device, sizes, block, tile)

    if call.cu_seqlens is not None:
        return from_documents(call.cu_seqlens, ("items", device, stream_of(device), sizes, block, tile), write), split
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return write(), split
    return _items_of_one_document(device, stream_of(device), sizes, block, tile), split


@lru_cache(maxsize=256)
def _items_of_one_document(device: torch.device, stream: int, sizes: tuple[int, ...], block: int, tile: int) -> Tensor:
    """They depend on shapes alone, so that every layer and step can read the same ones."""
    return _write_items(None, device, sizes, block, tile)


def _write_items(
    cu_seqlens: Tensor | None, device: torch.device, sizes: tuple[int, ...], block: int, tile: int
) -> Tensor:
    *_, split, total, _ = sizes
    step = SCAN.value
    items = torch.empty((total, ITEM.value), dtype=torch.int32, device=device)
    launch(
        work_items_kernel,
        -(-split // step) - (split - total) // step,
        (items, cu_seqlens),
        sizes,
        PACKED=cu_seqlens is not None,
        BLOCK=block,
        TILE=tile,
        SCAN=step,
        num_warps=4,
    )
    return items


def padded_blocks(call: AttentionInputs, block: int) -> int:
    """Blocks of a tensor that holds the query rows with every document padded to whole blocks."""
    rows = call.query.shape[2]
    if call.cu_seqlens is not None:
        return rows // block + call.cu_seqlens.shape[0] - 1
    return (call.q_start + rows - 1) // block - call.q_start // block + 1


@lru_cache(maxsize=64)
def far_table(far: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(far, dtype=torch.int32, device=device)


def head_stride(lists: BlockLists, far: Tensor) -> int:
    return far.numel() // lists.heads if lists.per_head else 0


def row_stats(
    call: AttentionInputs,
    lists: BlockLists,
    items: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tile: int,
) -> RowStats:
    """The statistics of the query rows, in blocks padded to whole tiles of ``tile`` rows; ``items`` are of such."""
    batch, heads, rows, head_dim = out.shape
    pad_block = -(-lists.block // tile) * tile
    padded_rows = padded_blocks(call, lists.block) * pad_block
    padded = torch.empty((2, batch, heads, padded_rows), dtype=torch.float32, device=out.device)
    stats = RowStats(torch.empty_like(lse), padded[0], padded[1], pad_block)
    launch(
        block_pattern_bwd_stats_kernel,
        items.shape[0] * heads * batch,
        (out, grad_out, lse, grad_lse, stats.delta, stats.padded_lse, stats.padded_delta, items),
        (
            *out.stride()[:3],
            *grad_out.stride()[:3],
            *(lse if grad_lse is None else grad_lse).stride(),
            items.shape[0],
            rows,
            call.q_start,
            padded_rows,
        ),
        HEADS=heads,
        D=head_dim,
        D_PAD=pad_head_dim(head_dim),
        BLOCK=lists.block,
        PAD_BLOCK=pad_block,
        BLOCK_M=tile,
        GRAD_LSE=grad_lse is not None,
        num_warps=8,
    )
    return stats


def add_partials(
    partial: Tensor, grad_key: Tensor, grad_value: Tensor, items: Tensor, lists: BlockLists, chunk: int
) -> None:
    """Add the sums of the chunks of split sink tiles into the gradients.

    ``partial`` is fp32 ``[B, Hkv, split_items, 2, tile, D_PAD]``.
    """
    batch, kv_heads, split_items, _, tile, d_pad = partial.shape
    if not split_items:
        return
    rows = min(16, tile)
    launch(
        block_pattern_bwd_sum_kernel,
        tile // rows * kv_heads * split_items * batch,
        (partial, grad_key, grad_value, items),
        (*grad_key.stride()[:3], *grad_value.stride()[:3], split_items, chunk),
        KV_HEADS=kv_heads,
        D=grad_key.shape[3],
        D_PAD=d_pad,
        BLOCK=lists.block,
        BLOCK_N=tile,
        ROWS=rows,
        num_warps=4,
    )
