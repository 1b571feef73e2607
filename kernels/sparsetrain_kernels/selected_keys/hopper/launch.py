"""Launches the Hopper kernels. Lists, row statistics and places of partial sums are those of the plain Triton path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.block_pattern.hopper.descriptors import line, tiles
from sparsetrain_kernels.key_lists.triton.tiles import KeyLists
from sparsetrain_kernels.launching import launch, on_device
from sparsetrain_kernels.selected_keys.hopper.forward import selected_fwd_hopper_kernel
from sparsetrain_kernels.selected_keys.hopper.grad_key_value import selected_bwd_dkv_hopper_kernel
from sparsetrain_kernels.selected_keys.hopper.grad_query import selected_bwd_dq_hopper_kernel
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs
from sparsetrain_kernels.selected_keys.triton.launch import (
    Bounds,
    document_rows,
    find_places,
    most_places,
    part_heads_of,
    row_stats,
    sum_heads,
    sum_partials,
)
from sparsetrain_kernels.selected_keys.triton.lists import STRETCH, TILE, stretch_lists, tile_lists

HALF = 64
KEY_STAGES, VALUE_STAGES = 3, 2
"""Slots of 128 keys and values in the forward kernel."""
STAGES = 4
"""Slots of 64 rows in the backward kernels."""
LOG2E = 1.4426950408889634


def attention_forward(inputs: SelectedInputs) -> tuple[Tensor, Tensor]:
    """``out`` like ``query``, and the log-sum-exp, fp32 ``[B, Hq, N]``."""
    query, key, value = inputs[:3]
    key, value = _gatherable(key), _gatherable(value)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device(query):
        bounds = document_rows(inputs)
        lists, scores = tile_lists(inputs, stretch_lists(inputs, bounds.start), bounds.start, seen=True)
        launch(
            selected_fwd_hopper_kernel,
            lists.keys.shape[2] * query.shape[1] * query.shape[0],
            (
                *(tiles(query, HALF), tiles(key, TILE), tiles(value, TILE), key, value, out, lse),
                *_listed(lists, scores, inputs.threshold, bounds),
            ),
            (*_strides(key, value, out), query.shape[2], inputs.window, *_sizes(lists, inputs), inputs.scale * LOG2E),
            **_constants(inputs),
            KEY_STAGES=KEY_STAGES,
            VALUE_STAGES=VALUE_STAGES,
        )
    return out, lse


def attention_backward(inputs: SelectedInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, laid out like them, and of scores and threshold, fp32 ``[B, Hs, N]``."""
    grads = map(torch.empty_like, inputs[:3])
    inputs = inputs._replace(key=_gatherable(inputs.key), value=_gatherable(inputs.value))
    query, key, value = inputs[:3]
    batch, heads, tokens, head_dim = query.shape
    kv_heads, selections = key.shape[1], inputs.scores.shape[1]
    grad_query, grad_key, grad_value = grads
    grad_scores = torch.empty((batch, kv_heads, tokens), dtype=torch.float32, device=query.device)
    grad_threshold = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    with on_device(query):
        bounds = document_rows(inputs)
        stretches = stretch_lists(inputs, bounds.start)
        lists, scores = tile_lists(inputs, stretches, bounds.start, seen=True)
        padded = row_stats(inputs, grad_out, out, lse)
        rows = (tiles(query, HALF), tiles(key, HALF), tiles(value, HALF), tiles(grad_out, HALF))
        launch(
            selected_bwd_dq_hopper_kernel,
            lists.keys.shape[2] * heads * batch,
            (
                *(*rows, key, value, *padded[:2], grad_query, grad_threshold),
                *_listed(lists, scores, padded[2], bounds),
            ),
            (
                *_strides(key, value, grad_query),
                *(tokens, padded[0].shape[2], inputs.window),
                *_sizes(lists, inputs),
                *(inputs.scale, inputs.scale * LOG2E),
            ),
            **_constants(inputs),
            STAGES=STAGES,
        )
        places_until = find_places(inputs)
        places = most_places(inputs, stretches)
        together = part_heads_of(batch, kv_heads, places, head_dim)
        for first_head in range(0, kv_heads, together):
            part_heads = min(together, kv_heads - first_head)
            partial = torch.empty((batch, part_heads, places, 2, head_dim), dtype=torch.float32, device=query.device)
            partial_scores = torch.empty((batch, part_heads, places), dtype=torch.float32, device=query.device)
            # First the partial sums of selected keys, then neighbours and all sums.
            for listed in (True, False):
                if not listed:
                    sum_partials(inputs, (partial, partial_scores), places_until, first_head)
                of_keys = (stretches.keys.shape[3] if listed else padded[0].shape[2]) // TILE
                count = stretches.keys.shape[2] if listed else 1
                launch(
                    selected_bwd_dkv_hopper_kernel,
                    of_keys * count * part_heads * batch,
                    (
                        *rows,
                        *(line(statistic, HALF) for statistic in padded[:2]),
                        line(padded[2], HALF) if listed else None,
                        *(key, value, grad_key, grad_value, grad_scores, partial, partial_scores),
                        *(scores, inputs.exit, bounds.end, stretches.keys, stretches.counts, places_until),
                    ),
                    (
                        *_strides(key, value, grad_key),
                        *grad_value.stride()[:3],
                        *(tokens, padded[0].shape[2], inputs.window),
                        *(of_keys, count, stretches.keys.shape[3], kv_heads, heads // kv_heads),
                        *(first_head, part_heads, places, inputs.scale * LOG2E),
                    ),
                    **_constants(inputs) | {"GATE": inputs.gate if listed else "none"},
                    STRETCH=STRETCH,
                    LISTED=listed,
                    STAGES=STAGES,
                )
    return (
        *(grad_query, grad_key, grad_value),
        sum_heads(grad_scores, selections),
        sum_heads(grad_threshold, selections),
    )


def _gatherable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows cannot be copied 16 bytes at a time."""
    aligned = all(stride % 16 == 0 for stride in tensor.stride()[:3]) and tensor.data_ptr() % 16 == 0
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def _listed(lists: KeyLists, scores: Tensor, threshold: Tensor, bounds: Bounds) -> tuple[Tensor | None, ...]:
    return (lists.keys, lists.seen, lists.counts, lists.whole, scores, threshold, bounds.start, bounds.end)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _sizes(lists: KeyLists, inputs: SelectedInputs) -> tuple[int, ...]:
    kv_heads = inputs.key.shape[1]
    return (*lists.keys.shape[2:], kv_heads, inputs.query.shape[1] // kv_heads)


def _constants(inputs: SelectedInputs) -> dict[str, Any]:
    return {
        "SHARED_SELECTION": inputs.scores.shape[1] == 1,
        "GATE": inputs.gate,
        "PACKED": inputs.cu_seqlens is not None,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
