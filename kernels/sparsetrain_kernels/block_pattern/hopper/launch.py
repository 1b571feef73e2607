"""Launches the Hopper kernels, and says where they apply."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.block_pattern.hopper.descriptors import line, tile_fields, tiles, tiles_of
from sparsetrain_kernels.block_pattern.hopper.forward import block_pattern_fwd_kernel
from sparsetrain_kernels.block_pattern.hopper.fused_launch import fused_backward, is_fused
from sparsetrain_kernels.block_pattern.hopper.grad_key_value import block_pattern_bwd_dkv_kernel
from sparsetrain_kernels.block_pattern.hopper.grad_query import block_pattern_bwd_dq_kernel
from sparsetrain_kernels.block_pattern.hopper.launch_order import heads_together
from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.block_pattern.triton.work import (
    add_partials,
    chunk_blocks,
    far_table,
    head_stride,
    row_stats,
    work_items,
)
from sparsetrain_kernels.inputs import AttentionInputs
from sparsetrain_kernels.launching import MOST_PREPARED, Launch, launch, on_device, prepare

TILE, HALF = 128, 64
FWD_STAGES = 2
"""Slots of 128 keys, and as many of values."""
BWD_ROWS = 64
"""Queries a slot in the kernel of keys and values, and keys a slot in that of queries."""
BWD_STAGES = 4
LOG2E = 1.4426950408889634


class _Forward(NamedTuple):
    """What calls of the forward kernel have in common that are laid out alike."""

    launch: Launch
    programs: int
    numbers: tuple[float, ...]
    fields: tuple[dict[str, Any] | None, ...]
    """Of the descriptors of query, key and value, see ``tile_fields``."""


_FORWARD: dict[tuple[Any, ...], _Forward] = {}


def attention_forward(call: AttentionInputs, lists: BlockLists) -> tuple[Tensor, Tensor]:
    """``out`` like ``query``, and the log-sum-exp, fp32 ``[B, Hq, N]``."""
    query, key, value = call[:3]
    rows = query.shape[2]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device(query):
        items, _ = work_items(call, lists, rows, rows, 0, TILE, 0)
        far = far_table(lists.far, query.device)
        # Short calls wait for the host: what layers and steps have in common is worked out once.
        strides = (query.stride(), key.stride(), value.stride())
        layout = (query.dtype, query.device, query.shape, key.shape[1], *strides)
        alike = (id(block_pattern_fwd_kernel), *layout, items.shape[0], lists, call.scale)
        if (known := _FORWARD.get(alike)) is None:
            if len(_FORWARD) >= MOST_PREPARED:
                _FORWARD.clear()
            known = _FORWARD[alike] = _prepare_forward(call, lists, (out, lse, far, items))
        launch_forward, programs, numbers, (of_query, of_key, of_value) = known
        described = (tiles_of(query, of_query, HALF), tiles_of(key, of_key, TILE), tiles_of(value, of_value, TILE))
        launch_forward(programs, (*described, out, lse, far, items), numbers)
    return out, lse


def _prepare_forward(
    call: AttentionInputs, lists: BlockLists, tensors: tuple[Tensor, Tensor, Tensor, Tensor]
) -> _Forward:
    """Of a call, and what is written and looked up: out, log-sum-exp, far distances and items."""
    out, _, far, items = tensors
    boxes = tuple(zip(call[:3], (HALF, TILE, TILE), strict=True))
    batch, heads, rows, _ = out.shape
    kv_heads = call.key.shape[1]
    programs = items.shape[0] * heads * batch
    numbers = (
        *out.stride()[:3],
        items.shape[0],
        kv_heads,
        rows,
        lists.window,
        lists.num_sinks,
        lists.period,
        head_stride(lists, far),
        call.scale * LOG2E,
    )
    prepared = prepare(
        block_pattern_fwd_kernel,
        (*(tiles(tensor, box) for tensor, box in boxes), *tensors),
        numbers,
        GROUP=heads // kv_heads,
        TPB=lists.block // TILE,
        FAR=lists.width,
        STAGES=FWD_STAGES,
        num_warps=4,
        maxnreg=168,
        enable_fp_fusion=True,
    )
    fields = tuple(tile_fields(tensor.shape, tensor.stride(), tensor.dtype, box) for tensor, box in boxes)
    return _Forward(prepared, programs, numbers, fields)


def attention_backward(
    call: AttentionInputs,
    lists: BlockLists,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them, and ``delta``, fp32 ``[B, Hq, N]``: by one kernel of
    five products a tile where it is the faster way and ``workspace`` bytes hold what it needs, else by two of seven."""
    if is_fused(call, workspace):
        return fused_backward(call, lists, (grad_out, grad_lse), (out, lse), workspace)
    return two_kernel_backward(call, lists, grad_out, grad_lse, out, lse)


def two_kernel_backward(
    call: AttentionInputs, lists: BlockLists, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients without a workspace: scores are computed once for queries and once for keys and values."""
    query, key, value = call[:3]
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    pattern = (lists.window, lists.num_sinks, lists.period)
    sizes = {
        "TPB": lists.block // TILE,
        "FAR": lists.width,
        "STAGES": BWD_STAGES,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    with on_device(query):
        items, _ = work_items(call, lists, rows, rows, 0, TILE, 0)
        stats = row_stats(call, lists, items, grad_out, grad_lse, out, lse, TILE)
        padded_rows = stats.padded_lse.shape[2]
        far = far_table(lists.far, query.device)
        launch(
            block_pattern_bwd_dq_kernel,
            items.shape[0] * heads * batch,
            (
                tiles(query, HALF),
                tiles(key, BWD_ROWS),
                tiles(value, BWD_ROWS),
                tiles(grad_out, HALF),
                stats.padded_lse,
                stats.padded_delta,
                grad_query,
                far,
                items,
            ),
            (
                *grad_query.stride()[:3],
                items.shape[0],
                heads,
                heads_together(items.shape[0] * heads * batch, kv_heads),
                heads // kv_heads,
                padded_rows,
                *pattern,
                head_stride(lists, far),
                call.scale,
                call.scale * LOG2E,
            ),
            BLOCK_N=BWD_ROWS,
            **sizes,
        )
        chunk = chunk_blocks(rows, lists)
        items, split_items = work_items(call, lists, rows, rows, 0, TILE, chunk)
        partial = torch.empty(
            (batch, kv_heads, split_items, 2, TILE, head_dim), dtype=torch.float32, device=query.device
        )
        far = far_table(lists.far_back, query.device)
        launch(
            block_pattern_bwd_dkv_kernel,
            items.shape[0] * kv_heads * batch,
            (
                tiles(query, BWD_ROWS),
                tiles(key, HALF),
                tiles(value, HALF),
                tiles(grad_out, BWD_ROWS),
                line(stats.padded_lse, BWD_ROWS),
                line(stats.padded_delta, BWD_ROWS),
                grad_key,
                grad_value,
                partial,
                far,
                items,
            ),
            (
                *grad_key.stride()[:3],
                *grad_value.stride()[:3],
                items.shape[0],
                split_items,
                kv_heads,
                heads_together(items.shape[0] * kv_heads * batch, kv_heads),
                heads // kv_heads,
                padded_rows,
                *pattern,
                head_stride(lists, far),
                chunk,
                call.scale * LOG2E,
            ),
            BLOCK_M=BWD_ROWS,
            **sizes,
        )
        add_partials(partial, grad_key, grad_value, items, lists, chunk)
    return grad_query, grad_key, grad_value, stats.delta
