"""Launches the Hopper kernels, and says where they apply."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsetrain_kernels.block_pattern.hopper.forward import block_pattern_fwd_kernel
from sparsetrain_kernels.block_pattern.hopper.grad_key_value import block_pattern_bwd_dkv_kernel
from sparsetrain_kernels.block_pattern.hopper.grad_query import block_pattern_bwd_dq_kernel
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
from sparsetrain_kernels.launching import on_device

TILE, HALF = 128, 64
FWD_STAGES = 2
"""Slots of 128 keys, and as many of values."""
BWD_ROWS = 64
"""Queries a slot in the kernel of keys and values, and keys a slot in that of queries."""
BWD_STAGES = 4
LINE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
LOG2E = 1.4426950408889634


def attention_forward(call: AttentionInputs, lists: BlockLists) -> tuple[Tensor, Tensor]:
    """``out`` like ``query``, and the log-sum-exp, fp32 ``[B, Hq, N]``."""
    query, key, value = call[:3]
    batch, heads, rows, _ = query.shape
    kv_heads = key.shape[1]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device(query):
        items, _ = work_items(call, lists, rows, rows, 0, TILE, 0)
        far = far_table(lists.far, query.device)
        block_pattern_fwd_kernel[(items.shape[0] * heads * batch,)](
            _tiles(query, HALF),
            _tiles(key, TILE),
            _tiles(value, TILE),
            out,
            lse,
            far,
            items,
            *out.stride()[:3],
            items.shape[0],
            kv_heads,
            rows,
            lists.window,
            lists.num_sinks,
            lists.period,
            head_stride(lists, far),
            call.scale * LOG2E,
            GROUP=heads // kv_heads,
            TPB=lists.block // TILE,
            FAR=lists.width,
            STAGES=FWD_STAGES,
            num_warps=4,
            maxnreg=168,
            enable_fp_fusion=True,
        )
    return out, lse


def attention_backward(
    call: AttentionInputs, lists: BlockLists, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them, and ``delta``, fp32 ``[B, Hq, N]``."""
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
        block_pattern_bwd_dq_kernel[(items.shape[0] * heads * batch,)](
            _tiles(query, HALF),
            _tiles(key, BWD_ROWS),
            _tiles(value, BWD_ROWS),
            _tiles(grad_out, HALF),
            stats.padded_lse,
            stats.padded_delta,
            grad_query,
            far,
            items,
            *grad_query.stride()[:3],
            items.shape[0],
            heads,
            heads // kv_heads,
            padded_rows,
            *pattern,
            head_stride(lists, far),
            call.scale,
            call.scale * LOG2E,
            BLOCK_N=BWD_ROWS,
            **sizes,
        )
        chunk = chunk_blocks(rows, lists)
        items, split_items = work_items(call, lists, rows, rows, 0, TILE, chunk)
        partial = torch.empty(
            (batch, kv_heads, split_items, 2, TILE, head_dim), dtype=torch.float32, device=query.device
        )
        far = far_table(lists.far_back, query.device)
        block_pattern_bwd_dkv_kernel[(items.shape[0] * kv_heads * batch,)](
            _tiles(query, BWD_ROWS),
            _tiles(key, HALF),
            _tiles(value, HALF),
            _tiles(grad_out, BWD_ROWS),
            _line(stats.padded_lse),
            _line(stats.padded_delta),
            grad_key,
            grad_value,
            partial,
            far,
            items,
            *grad_key.stride()[:3],
            *grad_value.stride()[:3],
            items.shape[0],
            split_items,
            kv_heads,
            heads // kv_heads,
            padded_rows,
            *pattern,
            head_stride(lists, far),
            chunk,
            call.scale * LOG2E,
            BLOCK_M=BWD_ROWS,
            **sizes,
        )
        add_partials(partial, grad_key, grad_value, items, lists, chunk)
    return grad_query, grad_key, grad_value, stats.delta


def _tiles(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of ``[B, H, N, D]`` for boxes of ``rows`` rows of one head."""
    tensor = tensor if _readable(tensor) else tensor.contiguous()
    block = [1, 1, rows, tensor.shape[3]]
    # The stride of a dimension of one element is never used, but it has to be a legal one.
    strides = [s if n > 1 else 8 for n, s in zip(tensor.shape[:3], tensor.stride())]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block, _layout(*block[2:], tensor.dtype))


@lru_cache(maxsize=16)
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(
        [1, 1, rows, head_dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def _readable(tensor: Tensor) -> bool:
    """TMA wants 16-byte addresses and strides, and rows of consecutive elements."""
    strides = [s for n, s in zip(tensor.shape[:3], tensor.stride()) if n > 1]
    return tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)


def _line(tensor: Tensor) -> TensorDescriptor:
    """A TMA descriptor of row statistics, for boxes of :data:`BWD_ROWS`."""
    return TensorDescriptor(tensor, [tensor.numel()], [1], [BWD_ROWS], LINE_LAYOUT)
