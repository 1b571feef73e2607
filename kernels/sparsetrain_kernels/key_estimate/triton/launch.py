"""Launches the kernels of an estimate. Everything follows from shapes and ``max_length``; no tensor is read on the
host."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.block_decode.triton.configs import multiprocessors
from sparsetrain_kernels.inputs import consecutive_rows, row_major
from sparsetrain_kernels.key_estimate.inputs import EstimateInputs
from sparsetrain_kernels.key_estimate.triton.bounds import page_scores_kernel
from sparsetrain_kernels.key_estimate.triton.configs import (
    Config,
    choose_config,
    choose_heads,
    choose_splits,
    granules_of_a_tile,
    keys_of_a_tile,
)
from sparsetrain_kernels.key_estimate.triton.scores import add_splits_kernel, estimate_kernel
from sparsetrain_kernels.key_estimate.triton.weights import key_weights_kernel
from sparsetrain_kernels.key_mirror.layout import BYTES, GRANULE, PageBounds
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device, pad_head_dim


def estimate(call: EstimateInputs, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """``scores``, fp16 ``[B, Hq, columns]``, and ``lse``, fp32 ``[B, Hq]``."""
    query = call.query
    batch, heads = query.shape[:2]
    _, kv_heads, page, half = call.mirror.codes.shape
    half_pad = pad_head_dim(2 * half) // 2
    listed = call.page_lists is not None
    group = heads // kv_heads
    tile_heads = choose_heads(group)
    config = config or choose_config(half_pad, tile_heads, page, listed)
    programs = batch * kv_heads * cdiv(group, tile_heads)
    splits = choose_splits(
        programs, cdiv(call.columns, config.block_n), config.programs * multiprocessors(query.device)
    )
    scores = torch.empty((batch, heads, call.columns), dtype=torch.float16, device=query.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=query.device)
    partial = lse
    if splits > 1:
        partial = torch.empty((batch, heads, splits), dtype=torch.float32, device=query.device)
    (lengths,) = row_major(call.lengths)
    table = consecutive_rows(call.block_table)
    lists, counts = (None, None)
    if call.page_lists is not None and call.page_counts is not None:
        lists, counts = row_major(call.page_lists, call.page_counts)
    mirror = call.mirror
    due = None if call.due is None else call.due.contiguous().view(torch.uint8)
    with on_device(query):
        launch(
            estimate_kernel,
            programs * splits,
            # Step and low of a token at a time.
            (
                *(query, mirror.codes, mirror.scale_low.view(torch.int32), mirror.center, mirror.spread),
                *(lengths, table, lists, counts, due, scores, partial),
            ),
            (
                *query.stride()[:2],
                table.stride(0),
                0 if lists is None else lists.shape[2],
                call.columns,
                splits,
                call.max_length,
                call.scale,
                call.softcap or 0.0,
            ),
            KV_HEADS=kv_heads,
            GROUP=group,
            HEADS=tile_heads,
            HALF=half,
            HALF_PAD=half_pad,
            PAGE=page,
            BLOCK_N=config.block_n,
            LISTED=call.granule if listed else 0,
            DUE=due is not None,
            SOFTCAP=call.softcap is not None,
            PACKED=not INTERPRETING and torch.version.hip is None,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            launch(
                add_splits_kernel,
                batch * heads,
                (partial, due, lse),
                (heads, splits),
                DUE=due is not None,
                SPLITS_PAD=next_power_of_2(splits),
                num_warps=1,
            )
    return scores, lse


def upper_bounds(
    query: Tensor,
    bounds: PageBounds,
    lengths: Tensor,
    block_table: Tensor,
    granules: int,
    scale: float,
    due: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`sparsetrain_kernels.page_scores`, of ``granules`` times 16 tokens."""
    batch, heads = query.shape[:2]
    _, kv_heads, in_page, _, head_dim = bounds.values.shape
    group = heads // kv_heads
    d_pad = pad_head_dim(head_dim)
    in_bytes = bounds.values.dtype == BYTES
    values = bounds.values.view(torch.uint8) if in_bytes else bounds.values
    block_g = granules_of_a_tile(values.element_size(), d_pad)
    tiles = cdiv(granules, block_g)
    scores = torch.empty((batch, kv_heads, granules), dtype=dtype, device=query.device)
    (lengths,) = row_major(lengths)
    table = consecutive_rows(block_table)
    due = None if due is None else due.contiguous().view(torch.uint8)
    with on_device(query):
        launch(
            page_scores_kernel,
            tiles * kv_heads * batch,
            (query, values, bounds.center, bounds.spread, lengths, table, due, scores),
            (*query.stride()[:2], table.stride(0), granules, tiles, scale),
            KV_HEADS=kv_heads,
            GROUP=group,
            HEADS=8 if in_bytes else 16,
            D=head_dim,
            D_PAD=d_pad,
            PAGE=in_page * GRANULE,
            BLOCK_G=block_g,
            BYTES=in_bytes,
            DUE=due is not None,
            PRECISION="ieee",
            num_warps=4,
        )
    return scores


def key_weights(
    query: Tensor,
    key_cache: Tensor,
    lse: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    max_length: int,
    scale: float,
    softcap: float | None,
    due: Tensor | None,
) -> Tensor:
    """As :func:`sparsetrain_kernels.key_weights`; fp16 ``[B, Hq, max_length]``."""
    batch, heads = query.shape[:2]
    _, kv_heads, page, head_dim = key_cache.shape
    d_pad = pad_head_dim(head_dim)
    block_n = keys_of_a_tile(key_cache.element_size(), d_pad)
    tiles = cdiv(max_length, block_n)
    weights = torch.empty((batch, heads, max_length), dtype=torch.float16, device=query.device)
    lengths, lse = row_major(lengths, lse)
    table = consecutive_rows(block_table)
    due = None if due is None else due.contiguous().view(torch.uint8)
    with on_device(query):
        launch(
            key_weights_kernel,
            tiles * kv_heads * batch,
            (query, key_cache, lse, lengths, table, due, weights),
            (
                *(*query.stride()[:2], table.stride(0), *key_cache.stride()[:3]),
                *(max_length, tiles, scale, softcap or 0.0),
            ),
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            HEADS=16,
            D=head_dim,
            D_PAD=d_pad,
            PAGE=page,
            BLOCK_N=block_n,
            DUE=due is not None,
            SOFTCAP=softcap is not None,
            PRECISION="ieee",
            num_warps=4,
        )
    return weights
