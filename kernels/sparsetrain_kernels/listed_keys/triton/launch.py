"""Launches the Triton kernels. Everything follows from shapes; nothing here reads a tensor on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.documents import document_tiles, from_documents
from sparsetrain_kernels.key_lists.triton.launch import Call, Part, launch_backward_rows, launch_forward
from sparsetrain_kernels.key_lists.triton.tiles import KeyLists
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device, pad_head_dim
from sparsetrain_kernels.listed_keys.inputs import ListedInputs
from sparsetrain_kernels.listed_keys.triton.configs import Configs, choose_configs, tile_lines
from sparsetrain_kernels.listed_keys.triton.grad_keys import (
    listed_bwd_keys_kernel,
    listed_bwd_order_kernel,
    listed_bwd_places_kernel,
    listed_bwd_sum_kernel,
)
from sparsetrain_kernels.listed_keys.triton.skipped import clear_skipped_rows
from sparsetrain_kernels.listed_keys.triton.work import Work, make_work
from sparsetrain_kernels.row_statistics import row_statistics

PARTIAL_BYTES = 2**31
"""Memory for what tiles of rows add to keys: as many KV heads go together as fit; of a single one, as many tiles."""
PLACES = (8, 128)
"""Tiles of rows, and of keys, whose places one program looks for."""


def attention_forward(inputs: ListedInputs) -> tuple[Tensor, Tensor]:
    """``out`` like ``query``, and the log-sum-exp, fp32 ``[B, Hq, N]``."""
    query = inputs.query
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    configs, shape = _setup(inputs)
    with on_device(query):
        work = make_work(inputs, shape["ROWS"])
        launch_forward(_call(inputs, work, shape), None, out, lse, configs.fwd)
        clear_skipped_rows(inputs, out, lse)
    return out, lse


def attention_backward(
    inputs: ListedInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them."""
    query, key, value = inputs[:3]
    batch, kv_heads, tokens, _ = key.shape
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    configs, shape = _setup(inputs)
    d_pad = shape["D_PAD"]
    # Half precision holds a tile's part as well as it does the weights; fp16 would not hold every size.
    dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
    with on_device(query):
        work = make_work(inputs, shape["ROWS"])
        call = _call(inputs, work, shape)
        statistics = row_statistics(out, grad_out, lse, grad_lse)
        tiles, capacity = work.tiles.shape[0], work.keys.shape[3]
        tile_bytes = batch * capacity * 2 * d_pad * dtype.itemsize
        together = max(1, min(kv_heads, PARTIAL_BYTES // (tiles * tile_bytes)))
        part = tiles if tiles * tile_bytes <= PARTIAL_BYTES else max(1, PARTIAL_BYTES // tile_bytes)
        partial = torch.empty((batch * together * part * capacity, 2, d_pad), dtype=dtype, device=query.device)
        sums = torch.empty((batch * together, tokens, 2, d_pad), dtype=torch.float32, device=query.device)
        for first_head in range(0, kv_heads, together):
            heads = (first_head, min(together, kv_heads - first_head))
            for first_tile in range(0, tiles, part):
                own = Part(first_tile, min(part, tiles - first_tile), *heads)
                launch_backward_rows(call, None, own, grad_out, statistics, grad_query, partial, configs.rows)
                _launch_sums(inputs, partial, sums, work, own, configs, shape)
            _launch_keys(inputs, grad_out, statistics, (grad_key, grad_value), sums, work, heads, configs, shape)
        clear_skipped_rows(inputs, grad_query)
    return grad_query, grad_key, grad_value


def _launch_sums(
    inputs: ListedInputs,
    partial: Tensor,
    sums: Tensor,
    work: Work,
    part: Part,
    configs: Configs,
    shape: dict[str, Any],
) -> None:
    batch, kv_heads, tokens, _ = inputs.key.shape
    key_tiles, table = _key_tiles(inputs, configs.sums.block_n)
    key_tile_of = None if table is None else _tile_of_keys(inputs, table)
    segments, capacity = work.keys.shape[2:]
    alike = {"KV_HEADS": kv_heads, "BLOCK_N": configs.sums.block_n, "PACKED": table is not None}
    places = torch.empty((batch * part.heads, key_tiles + 1, part.tiles), dtype=torch.int32, device=partial.device)
    launch(
        listed_bwd_places_kernel,
        cdiv(part.tiles, PLACES[0]) * cdiv(key_tiles + 1, PLACES[1]) * part.heads * batch,
        (places, work.keys, work.counts, work.tiles, table),
        (tokens, segments, *part, capacity, key_tiles, capacity.bit_length()),
        TILES=PLACES[0],
        BOUNDS=PLACES[1],
        **alike,
    )
    # Of each tile of keys and list, the entries up to there, tile by tile of keys.
    until = places.diff(dim=1).flatten(1).cumsum(1, dtype=torch.int32)
    order = torch.empty((batch * part.heads, part.tiles * capacity), dtype=torch.int32, device=partial.device)
    launch(
        listed_bwd_order_kernel,
        part.tiles * part.heads * batch,
        (order, until, places, work.keys, work.counts, work.tiles, key_tile_of, table),
        (tokens, segments, *part, capacity, key_tiles),
        SCAN=min(1024, max(64, next_power_of_2(capacity))),
        **alike,
    )
    launch(
        listed_bwd_sum_kernel,
        2 * key_tiles * part.heads * batch,
        (partial, sums, order, until, table),
        (tokens, part.tiles, part.heads, capacity, key_tiles),
        D_PAD=shape["D_PAD"],
        BLOCK_N=configs.sums.block_n,
        PACKED=table is not None,
        ENTRIES=configs.sums.block_m,
        FIRST=part.first_tile == 0,
        PRECISION="ieee",
        num_warps=configs.sums.num_warps,
        num_stages=configs.sums.num_stages,
    )


def _launch_keys(
    inputs: ListedInputs,
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    sums: Tensor,
    work: Work,
    heads: tuple[int, int],
    configs: Configs,
    shape: dict[str, Any],
) -> None:
    query, key, value = inputs[:3]
    config = configs.keys
    key_tiles, table = _key_tiles(inputs, config.block_n)
    segments = work.keys.shape[2]
    own = {name: number for name, number in shape.items() if name != "ROWS"}
    launch(
        listed_bwd_keys_kernel,
        key_tiles * heads[1] * query.shape[0],
        (
            query,
            key,
            value,
            grad_out,
            *statistics,
            *grads,
            sums,
            inputs.cu_segments,
            inputs.skip,
            work.starts,
            work.ends,
            table,
        ),
        (
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_out.stride()[:3],
            *grads[0].stride()[:3],
            *grads[1].stride()[:3],
            query.shape[2],
            segments,
            inputs.window,
            *heads,
            key_tiles,
            segments.bit_length(),
            inputs.scale,
        ),
        **own,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PACKED=table is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _setup(inputs: ListedInputs) -> tuple[Configs, dict[str, Any]]:
    """The configurations, and what all kernels over rows and keys are compiled for."""
    query = inputs.query
    head_dim, kv_heads = query.shape[3], inputs.key.shape[1]
    group, d_pad = query.shape[1] // kv_heads, pad_head_dim(head_dim)
    usual = cdiv(query.shape[2], inputs.lists.shape[2])
    lines = tile_lines(query.dtype, d_pad, usual, group)
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "D": head_dim, "D_PAD": d_pad, "ROWS": lines // group}
    return choose_configs(query.dtype, d_pad, lines), {**shape, "PRECISION": "ieee"}


def _call(inputs: ListedInputs, work: Work, shape: dict[str, Any]) -> Call:
    return Call(*inputs[:3], inputs.scale, KeyLists(work.keys, work.counts, shape["ROWS"], tiles=work.tiles))


def _key_tiles(inputs: ListedInputs, keys: int) -> tuple[int, Tensor | None]:
    """How many tiles of ``keys`` keys there are, and their bounds, int32 ``[tiles, 2]``, if they are no plain cut."""
    tokens, cu_seqlens = inputs.key.shape[2], inputs.cu_seqlens
    if cu_seqlens is None:
        return cdiv(tokens, keys), None
    most = tokens // keys + cu_seqlens.shape[0] - 1
    return most, from_documents(cu_seqlens, ("tiles", most, keys), lambda: document_tiles(cu_seqlens, keys, most))


def _tile_of_keys(inputs: ListedInputs, tiles: Tensor) -> Tensor:
    """Which of the ``tiles`` of packed documents each key is in, int32 ``[N]``."""
    tokens, cu_seqlens = inputs.key.shape[2], inputs.cu_seqlens
    assert cu_seqlens is not None

    def find() -> Tensor:
        key = torch.arange(tokens, dtype=torch.int32, device=tiles.device)
        return torch.searchsorted(tiles[:, 0].contiguous(), key, right=True, out_int32=True) - 1

    return from_documents(cu_seqlens, ("tile of keys", tokens, tiles.shape[0]), find)
