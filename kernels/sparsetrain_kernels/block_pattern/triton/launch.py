"""Launches the plain Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.block_pattern.triton import backward, forward
from sparsetrain_kernels.block_pattern.triton.configs import choose_configs
from sparsetrain_kernels.block_pattern.triton.work import (
    add_partials,
    chunk_blocks,
    far_table,
    head_stride,
    row_stats,
    work_items,
)
from sparsetrain_kernels.inputs import AttentionInputs
from sparsetrain_kernels.launching import launch, on_device, pad_head_dim


def attention_forward(call: AttentionInputs, lists: BlockLists) -> tuple[Tensor, Tensor]:
    """``out`` like ``query``, and the log-sum-exp, fp32 ``[B, Hq, N]``."""
    query, key, value = call[:3]
    batch, heads, rows, head_dim = query.shape
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    d_pad = pad_head_dim(head_dim)
    config = choose_configs(query.dtype, d_pad, lists.block).fwd
    with on_device(query):
        items, _ = work_items(call, lists, rows, call.q_start + rows, call.q_start, config.block_m, 0)
        launch(
            forward.block_pattern_fwd_kernel,
            items.shape[0] * heads * batch,
            (query, key, value, out, lse, call.sink_logits, far := far_table(lists.far, query.device), items),
            (
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *out.stride()[:3],
                items.shape[0],
                rows,
                call.q_start,
                lists.window,
                lists.num_sinks,
                lists.period,
                head_stride(lists, far),
                call.scale,
                call.softcap or 0.0,
            ),
            HEADS=heads,
            GROUP=heads // key.shape[1],
            D=head_dim,
            D_PAD=d_pad,
            BLOCK=lists.block,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            FAR=lists.width,
            SOFTCAP=call.softcap is not None,
            SINK_LOGITS=call.sink_logits is not None,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse


def attention_backward(
    call: AttentionInputs, lists: BlockLists, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them, and ``delta``, fp32 ``[B, Hq, N]``: the sum of each
    row's ``grad_out * out``, less the gradient of its log-sum-exp."""
    query, key, value = call[:3]
    batch, heads, rows, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    d_pad = pad_head_dim(head_dim)
    configs = choose_configs(query.dtype, d_pad, lists.block)
    geometry: dict[str, Any] = {
        "D": head_dim,
        "D_PAD": d_pad,
        "BLOCK": lists.block,
        "FAR": lists.width,
        "SOFTCAP": call.softcap is not None,
        "PRECISION": "ieee",
    }
    pattern = (lists.window, lists.num_sinks, lists.period)
    with on_device(query):
        config = configs.dq
        items, _ = work_items(call, lists, rows, call.q_start + rows, call.q_start, config.block_m, 0)
        stats = row_stats(call, lists, items, grad_out, grad_lse, out, lse, config.block_m)
        launch(
            backward.block_pattern_bwd_dq_kernel,
            items.shape[0] * heads * batch,
            (
                query,
                key,
                value,
                grad_out,
                stats.padded_lse,
                stats.padded_delta,
                grad_query,
                far := far_table(lists.far, query.device),
                items,
            ),
            (
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *grad_out.stride()[:3],
                *grad_query.stride()[:3],
                items.shape[0],
                stats.padded_lse.shape[2],
                call.q_start,
                *pattern,
                head_stride(lists, far),
                call.scale,
                call.softcap or 0.0,
            ),
            HEADS=heads,
            GROUP=heads // kv_heads,
            PAD_BLOCK=stats.pad_block,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **geometry,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        config = configs.dkv
        chunk = chunk_blocks(keys, lists)
        items, split_items = work_items(call, lists, keys, keys, 0, config.block_n, chunk)
        partial = torch.empty(
            (batch, kv_heads, split_items, 2, config.block_n, d_pad), dtype=torch.float32, device=query.device
        )
        launch(
            backward.block_pattern_bwd_dkv_kernel,
            items.shape[0] * kv_heads * batch,
            (
                query,
                key,
                value,
                grad_out,
                stats.padded_lse,
                stats.padded_delta,
                grad_key,
                grad_value,
                partial,
                far := far_table(lists.far_back, query.device),
                items,
            ),
            (
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *grad_out.stride()[:3],
                *grad_key.stride()[:3],
                *grad_value.stride()[:3],
                items.shape[0],
                split_items,
                stats.padded_lse.shape[2],
                call.q_start,
                call.q_start + rows,
                *pattern,
                head_stride(lists, far),
                chunk,
                call.scale,
                call.softcap or 0.0,
            ),
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            PAD_BLOCK=stats.pad_block,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PACKED=call.cu_seqlens is not None,
            **geometry,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        add_partials(partial, grad_key, grad_value, items, lists, chunk)
    return grad_query, grad_key, grad_value, stats.delta
