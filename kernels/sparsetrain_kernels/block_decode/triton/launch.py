"""Launches the decoding kernels. Everything follows from shapes and ``max_length``; no tensor is read on the host."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparsetrain_kernels.block_decode.inputs import DecodeInputs
from sparsetrain_kernels.block_decode.triton import kernels
from sparsetrain_kernels.block_decode.triton.configs import (
    Config,
    choose_config,
    choose_splits,
    multiprocessors,
)
from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.block_pattern.triton.work import far_table, head_stride
from sparsetrain_kernels.inputs import consecutive_rows, row_major
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device, pad_head_dim

NUM_WARPS = 4
MERGE_STEP = 16
"""Shares merged at a time."""


def decode(call: DecodeInputs, lists: BlockLists) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, rows, D]`` in the query's dtype, and the log-sum-exp, fp32 ``[B, Hq, rows]``."""
    query = call.query
    batch, heads, rows, head_dim = query.shape
    kv_heads = call.key_cache.shape[1]
    d_pad = pad_head_dim(head_dim)
    config = choose_config(query.dtype, d_pad, lists.block, heads // kv_heads * rows, call.block_table is not None)
    row_tiles = cdiv(heads // kv_heads * rows, config.block_m)
    longest = longest_list(lists, cdiv(call.max_length, lists.block))
    splits = choose_splits(
        batch * kv_heads * row_tiles,
        longest * cdiv(lists.block, config.block_n),
        multiprocessors(query.device),
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device(query):
        if splits == 1:
            _attend(call, lists, config, 1, row_tiles, out, lse)
            return out, lse
        partial = torch.empty((*query.shape[:3], splits, head_dim), dtype=torch.float32, device=query.device)
        partial_lse = torch.empty((*query.shape[:3], splits), dtype=torch.float32, device=query.device)
        _attend(call, lists, config, splits, row_tiles, partial, partial_lse)
        merge(partial, partial_lse, out, lse)
    return out, lse


def merge(partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the splits of each row, fp32 ``[..., splits, D]`` and ``[..., splits]``, into ``out [..., D]`` and ``lse
    [...]``. On the device of the tensors."""
    splits, head_dim = partial.shape[-2:]
    launch(
        kernels.merge_kernel,
        lse.numel(),
        (partial, partial_lse, out, lse),
        (splits,),
        D=head_dim,
        D_PAD=pad_head_dim(head_dim),
        SPLITS_PAD=next_power_of_2(splits),
        STEP=MERGE_STEP,
        num_warps=NUM_WARPS,
    )


def _attend(
    call: DecodeInputs, lists: BlockLists, config: Config, splits: int, row_tiles: int, out: Tensor, lse: Tensor
) -> None:
    """Attention of every split, into ``out`` and ``lse`` with an entry for each split of a row."""
    query, key, value = call.query, call.key_cache, call.value_cache
    query = consecutive_rows(query)
    batch, heads, rows, head_dim = query.shape
    kv_heads, page_size = key.shape[1:3]
    (lengths,) = row_major(call.lengths)
    table = call.block_table
    if table is not None:
        table = consecutive_rows(table)
    sinks = None if call.sink_logits is None else row_major(call.sink_logits)[0]
    far = far_table(lists.far, query.device)
    launch(
        kernels.decode_kernel,
        batch * kv_heads * splits * row_tiles,
        # Without a table its pointer is moved and never read.
        (query, key, value, out, lse, lengths, lengths if table is None else table, sinks, far),
        (
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            0 if table is None else table.stride(0),
            splits,
            call.max_length,
            call.token_window or 0,
            lists.window,
            lists.num_sinks,
            lists.period,
            head_stride(lists, far),
            call.scale,
            call.softcap or 0.0,
        ),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        ROWS=rows,
        D=head_dim,
        D_PAD=pad_head_dim(head_dim),
        BLOCK=lists.block,
        PAGE=0 if table is None else page_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        FAR=lists.width,
        SOFTCAP=call.softcap is not None,
        SINK_LOGITS=call.sink_logits is not None,
        TOKEN_WINDOW=call.token_window is not None,
        PRECISION="ieee",
        num_warps=NUM_WARPS,
        num_stages=config.num_stages,
    )


@lru_cache(maxsize=256)
def longest_list(lists: BlockLists, num_blocks: int) -> int:
    """Blocks in the longest list of the first ``num_blocks``. The last period has it: lists of a phase only grow."""
    blocks = range(max(num_blocks - lists.period, 0), num_blocks)
    return max(len(lists.key_blocks(t, head)) for head in range(lists.heads) for t in blocks)
