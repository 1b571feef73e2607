"""Launches the fused backward kernel and what comes before and after it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetrain_kernels.block_pattern.hopper.descriptors import line, tiles
from sparsetrain_kernels.block_pattern.hopper.fused_backward import block_pattern_bwd_fused_kernel
from sparsetrain_kernels.block_pattern.hopper.launch_order import MANY_ADDING_PROGRAMS, heads_together
from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.block_pattern.triton.query_sum import QuerySum
from sparsetrain_kernels.block_pattern.triton.work import chunk_blocks, far_table, head_stride, work_items
from sparsetrain_kernels.inputs import AttentionInputs
from sparsetrain_kernels.launching import cdiv, launch, on_device

TILE = 128
ROWS = 64
"""Queries a step."""
STAGES = 3
HEAD_DIM = 128
"""Heads of 64 gain nothing: their time goes into exponentials."""
LEAST_ROWS = 2**18
"""Query rows of all heads, from which on the fused kernel is the faster way: 32 heads of 8,192 tokens. Twice as many
where each has a KV head of its own."""
LOG2E = 1.4426950408889634


def is_fused(call: AttentionInputs, workspace: int) -> bool:
    """Whether the fused kernel is the faster way, and ``workspace`` bytes hold the sums of a KV head at least."""
    batch, heads, rows, head_dim = call.query.shape
    group = heads // call.key.shape[1]
    least = LEAST_ROWS if group > 1 else 2 * LEAST_ROWS
    return head_dim == HEAD_DIM and batch * heads * rows >= least and workspace >= 4 * group * rows * head_dim


def fused_backward(
    call: AttentionInputs,
    lists: BlockLists,
    grads: tuple[Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them, and ``delta``, fp32 ``[B, Hq, N]``, from those of the
    ``outputs``, out and log-sum-exp: as a whole, or a few KV heads at a time, whose sums fit into ``workspace``."""
    query, key, value = call[:3]
    grad_query, grad_key, grad_value, delta = map(torch.empty_like, (query, key, value, outputs[1]))
    results = grad_query, grad_key, grad_value, delta
    with on_device(query):
        if 4 * query.numel() <= workspace:
            _launch(call, lists, grads, outputs, results)
            return results
        for row, some, of_group in _parts(call, workspace):
            part = call._replace(query=query[row, of_group], key=key[row, some], value=value[row, some])
            _launch(
                part,
                _lists_of_heads(lists, some),
                (grads[0][row, of_group], None if grads[1] is None else grads[1][row, of_group]),
                (outputs[0][row, of_group], outputs[1][row, of_group]),
                tuple(result[row, which] for result, which in zip(results, (of_group, some, some, of_group))),
            )
    return results


def _parts(call: AttentionInputs, workspace: int) -> Iterator[tuple[slice, slice, slice]]:
    """Parts as equal as can be: rows of the batch, KV heads, and the query heads of their groups."""
    batch, heads, rows, head_dim = call.query.shape
    kv_heads = call.key.shape[1]
    group = heads // kv_heads
    fitting = workspace // (4 * group * rows * head_dim)
    here = cdiv(kv_heads, cdiv(kv_heads, fitting))
    for row in range(batch):
        for first in range(0, kv_heads, here):
            last = min(first + here, kv_heads)
            yield slice(row, row + 1), slice(first, last), slice(first * group, last * group)


def _lists_of_heads(lists: BlockLists, heads: slice) -> BlockLists:
    if not lists.per_head:
        return lists
    size = lists.period * lists.width
    of_heads = slice(heads.start * size, heads.stop * size)
    return lists._replace(heads=heads.stop - heads.start, far=lists.far[of_heads], far_back=lists.far_back[of_heads])


def _launch(
    call: AttentionInputs,
    lists: BlockLists,
    grads: tuple[Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor],
    results: tuple[Tensor, ...],
) -> None:
    """Writes the ``results``; ``delta``, and the log-sum-exp, have consecutive elements."""
    query, key, value = call[:3]
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    grad_query, grad_key, grad_value, delta = results
    chunk = chunk_blocks(rows, lists)
    query_items, _ = work_items(call, lists, rows, rows, 0, TILE, 0)
    items, split_items = work_items(call, lists, rows, rows, 0, TILE, chunk)
    far = far_table(lists.far_back, query.device)
    partial = torch.empty((batch, kv_heads, split_items, 2, TILE, head_dim), dtype=torch.float32, device=query.device)
    total = QuerySum(call, lists, query_items, TILE, grads, outputs, delta)
    programs = items.shape[0] * kv_heads * batch
    launch(
        block_pattern_bwd_fused_kernel,
        programs,
        (
            tiles(query, ROWS),
            tiles(key, TILE),
            tiles(value, TILE),
            tiles(grads[0], ROWS),
            line(total.padded_lse, ROWS),
            line(total.padded_delta, ROWS),
            line(total.scale, ROWS),
            tiles(total.integers, ROWS, head_dim // 2),
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
            heads_together(programs, kv_heads, MANY_ADDING_PROGRAMS),
            heads // kv_heads,
            total.scale.shape[2],
            lists.window,
            lists.num_sinks,
            lists.period,
            head_stride(lists, far),
            chunk,
            call.scale * LOG2E,
        ),
        TPB=lists.block // TILE,
        FAR=lists.width,
        BLOCK_M=ROWS,
        STAGES=STAGES,
        num_warps=4,
        maxnreg=168,
        enable_fp_fusion=True,
    )
    total.finish(grad_query, (partial, grad_key, grad_value, items, chunk) if split_items else None)
