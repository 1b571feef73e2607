"""Launches the Triton kernels. Everything follows from shapes; nothing here reads a tensor on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.dense.row_inputs import RowInputs
from sparsetrain_kernels.dense.triton.configs import choose_configs
from sparsetrain_kernels.dense.triton.keys import causal_rows_bwd_dkv_kernel
from sparsetrain_kernels.dense.triton.rows import causal_rows_bwd_dq_kernel, causal_rows_fwd_kernel
from sparsetrain_kernels.documents import document_tiles, known_bounds
from sparsetrain_kernels.launching import cdiv, launch, on_device, pad_head_dim
from sparsetrain_kernels.row_statistics import row_statistics


def rows_forward(inputs: RowInputs) -> tuple[Tensor, Tensor]:
    """``out`` like ``query``, and the log-sum-exp, fp32 ``[B, Hq, P]``."""
    query, key, value, positions = inputs[:4]
    batch, heads, rows, head_dim = query.shape
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    config = choose_configs(query.dtype, pad_head_dim(head_dim)).fwd
    with on_device(query):
        tiles, table, starts = row_tiles(inputs, config.block_m)
        launch(
            causal_rows_fwd_kernel,
            tiles * heads * batch,
            (query, key, value, out, lse, positions, starts, table),
            (
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *out.stride()[:3],
                rows,
                tiles,
                inputs.scale,
            ),
            HEADS=heads,
            **_shape(inputs),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PACKED=table is not None,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse


def rows_backward(
    inputs: RowInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them."""
    with on_device(inputs.query):
        statistics = row_statistics(out, grad_out, lse, grad_lse)
        return grad_rows(inputs, grad_out, statistics), *_grad_keys(inputs, grad_out, statistics)


def grad_rows(inputs: RowInputs, grad_out: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of the query, laid out like it."""
    query, key, value, positions = inputs[:4]
    batch, heads, rows, head_dim = query.shape
    grad_query = torch.empty_like(query)
    config = choose_configs(query.dtype, pad_head_dim(head_dim)).dq
    tiles, table, starts = row_tiles(inputs, config.block_m)
    launch(
        causal_rows_bwd_dq_kernel,
        tiles * heads * batch,
        (query, key, value, grad_out, *statistics, grad_query, positions, starts, table),
        (
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_out.stride()[:3],
            *grad_query.stride()[:3],
            rows,
            tiles,
            inputs.scale,
        ),
        HEADS=heads,
        **_shape(inputs),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PACKED=table is not None,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return grad_query


def _grad_keys(inputs: RowInputs, grad_out: Tensor, statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    query, key, value, positions = inputs[:4]
    batch, kv_heads = key.shape[:2]
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    config = choose_configs(query.dtype, pad_head_dim(query.shape[3])).dkv
    table = key_tiles(inputs, config.block_n)
    launch(
        causal_rows_bwd_dkv_kernel,
        table.shape[0] * kv_heads * batch,
        (query, key, value, grad_out, *statistics, grad_key, grad_value, positions, table),
        (
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_out.stride()[:3],
            *grad_key.stride()[:3],
            *grad_value.stride()[:3],
            query.shape[2],
            table.shape[0],
            inputs.scale,
        ),
        KV_HEADS=kv_heads,
        **_shape(inputs),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return grad_key, grad_value


def row_tiles(inputs: RowInputs, size: int) -> tuple[int, Tensor | None, Tensor | None]:
    """How many tiles of ``size`` rows there are; with packed documents also their bounds, int32 ``[tiles, 2]``, each
    within a document, and of each key the first of its document, int32 ``[M]``."""
    rows, cu_seqlens = inputs.query.shape[2], inputs.cu_seqlens
    if cu_seqlens is None:
        return cdiv(rows, size), None, None
    most = rows // size + cu_seqlens.shape[0] - 1
    bounds = torch.searchsorted(inputs.query_positions, cu_seqlens, out_int32=True)
    starts, _ = known_bounds(inputs.key.shape[2], cu_seqlens, inputs.query.device)
    return most, document_tiles(bounds, size, most), starts


def key_tiles(inputs: RowInputs, size: int) -> Tensor:
    """Tiles of ``size`` keys and the rows that see them, int32 ``[tiles, 5]``, as the kernel over keys reads them."""
    keys, cu_seqlens, positions = inputs.key.shape[2], inputs.cu_seqlens, inputs.query_positions
    if cu_seqlens is None:
        start = torch.arange(0, keys, size, dtype=torch.int32, device=positions.device)
        bounds = torch.stack((start, (start + size).clamp(max=keys)), 1)
        last = torch.full_like(start, inputs.query.shape[2])
    else:
        most = keys // size + cu_seqlens.shape[0] - 1
        bounds = document_tiles(cu_seqlens, size, most)
        _, ends = known_bounds(keys, cu_seqlens, positions.device)
        ends = ends.take(bounds[:, 0].clamp(max=keys - 1).long())
        last = torch.searchsorted(positions, ends, out_int32=True)
    first = torch.searchsorted(positions, bounds[:, 0].contiguous(), out_int32=True).minimum(last)
    whole = torch.searchsorted(positions, bounds[:, 1] - 1, out_int32=True).minimum(last)
    return torch.cat((bounds, torch.stack((first, whole, last), 1)), 1).contiguous()


def _shape(inputs: RowInputs) -> dict[str, Any]:
    head_dim = inputs.query.shape[3]
    group = inputs.query.shape[1] // inputs.key.shape[1]
    return {"GROUP": group, "D": head_dim, "D_PAD": pad_head_dim(head_dim)}
