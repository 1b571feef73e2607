"""Launches the Triton kernels. Everything follows from shapes; nothing here reads a tensor on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.documents import known_bounds
from sparsetrain_kernels.key_lists.triton.launch import (
    Call,
    Part,
    Selection,
    count_tiles,
    launch_backward_rows,
    launch_forward,
)
from sparsetrain_kernels.key_lists.triton.tiles import KeyLists
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device, pad_head_dim
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs
from sparsetrain_kernels.selected_keys.triton.configs import choose_configs
from sparsetrain_kernels.selected_keys.triton.grad_key_value import (
    selected_bwd_dkv_kernel,
    selected_bwd_stretch_kernel,
    selected_bwd_sum_kernel,
)
from sparsetrain_kernels.selected_keys.triton.lists import STRETCH, TILE, stretch_lists, tile_lists
from sparsetrain_kernels.selected_keys.triton.row_stats import selected_bwd_places_kernel, selected_bwd_stats_kernel

PARTIAL_BYTES = 2**29
"""Memory for the partial sums of the selected keys: as many KV heads go together as fit, at least one."""
SUM_KEYS, SUM_PARTS = 16, 8
"""Keys of a program that adds up partial sums, and how many of a key it reads at once."""
PLACES_KEYS = 8192
"""Keys that are counted at once to find the places of partial sums."""


class Bounds(NamedTuple):
    """Of each row's document, the first row and the one past the last, int32 ``[N]``; None where there is only one."""

    start: Tensor | None
    end: Tensor | None


def attention_forward(inputs: SelectedInputs) -> tuple[Tensor, Tensor]:
    """``out`` like ``query``, and the log-sum-exp, fp32 ``[B, Hq, N]``."""
    query = inputs.query
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    config = choose_configs(query.dtype, pad_head_dim(query.shape[3])).fwd
    with on_device(query):
        bounds = document_rows(inputs)
        call, selection = _setup(inputs, stretch_lists(inputs, bounds.start), bounds.start)
        launch_forward(call, selection, out, lse, config)
    return out, lse


def attention_backward(inputs: SelectedInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, laid out like them, and of scores and threshold, fp32 ``[B, Hs, N]``."""
    query, key, value = inputs[:3]
    batch, heads, tokens, _ = query.shape
    kv_heads, selections = key.shape[1], inputs.scores.shape[1]
    configs = choose_configs(query.dtype, pad_head_dim(query.shape[3]))
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    grad_scores = torch.empty((batch, kv_heads, tokens), dtype=torch.float32, device=query.device)
    grad_threshold = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3]]
    with on_device(query):
        bounds = document_rows(inputs)
        stretches = stretch_lists(inputs, bounds.start)
        call, selection = _setup(inputs, stretches, bounds.start)
        padded = row_stats(inputs, grad_out, out, lse)
        padded_tokens = padded[0].shape[2]
        launch_backward_rows(
            call,
            selection._replace(threshold=padded[2]),
            Part(0, count_tiles(call.lists, query, configs.dq), 0, kv_heads),
            grad_out,
            padded[:2],
            grad_query,
            grad_threshold,
            configs.dq,
        )
        config, scores = configs.dkv, selection.scores
        key_tiles = cdiv(tokens, config.block_n)
        places_until = find_places(inputs)
        places = most_places(inputs, stretches)
        together = part_heads_of(batch, kv_heads, places, pad_head_dim(query.shape[3]))
        for first_head in range(0, kv_heads, together):
            part_heads = min(together, kv_heads - first_head)
            partial = _launch_stretches(
                inputs, grad_out, scores, padded, stretches, places_until, places, strides, first_head, part_heads
            )
            sum_partials(inputs, partial, places_until, first_head)
            launch(
                selected_bwd_dkv_kernel,
                key_tiles * part_heads * batch,
                (
                    query,
                    key,
                    value,
                    grad_out,
                    *padded[:2],
                    grad_key,
                    grad_value,
                    grad_scores,
                    *partial,
                    inputs.exit,
                    bounds.end,
                    places_until,
                ),
                (
                    *strides,
                    *grad_key.stride()[:3],
                    *grad_value.stride()[:3],
                    tokens,
                    padded_tokens,
                    inputs.window,
                    key_tiles,
                    first_head,
                    part_heads,
                    places,
                    inputs.scale,
                ),
                KV_HEADS=kv_heads,
                **_shape(inputs),
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                STRETCH=STRETCH,
                PACKED=bounds.end is not None,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=True,
            )
    return (
        grad_query,
        grad_key,
        grad_value,
        sum_heads(grad_scores, selections),
        sum_heads(grad_threshold, selections),
    )


def _launch_stretches(
    inputs: SelectedInputs,
    grad_out: Tensor,
    scores: Tensor,
    padded: tuple[Tensor, Tensor, Tensor],
    stretches: KeyLists,
    places_until: Tensor,
    places: int,
    strides: list[int],
    first_head: int,
    part_heads: int,
) -> tuple[Tensor, Tensor]:
    """The partial sums of ``part_heads`` KV heads from ``first_head`` on, of keys and values, and of scores."""
    query, key, value = inputs[:3]
    batch, kv_heads = key.shape[:2]
    d_pad = pad_head_dim(query.shape[3])
    config = choose_configs(query.dtype, d_pad).stretch
    partial = torch.empty((batch, part_heads, places, 2, d_pad), dtype=torch.float32, device=query.device)
    partial_scores = torch.empty((batch, part_heads, places), dtype=torch.float32, device=query.device)
    count, capacity = stretches.keys.shape[2:]
    key_tiles = cdiv(capacity, config.block_n)
    launch(
        selected_bwd_stretch_kernel,
        key_tiles * count * part_heads * batch,
        (
            query,
            key,
            value,
            grad_out,
            *padded,
            partial,
            partial_scores,
            scores,
            inputs.exit,
            stretches.keys,
            stretches.counts,
            places_until,
        ),
        (
            *strides,
            query.shape[2],
            padded[0].shape[2],
            inputs.window,
            count,
            capacity,
            first_head,
            part_heads,
            places,
            inputs.scale,
        ),
        KV_HEADS=kv_heads,
        **_shape(inputs),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STRETCH=STRETCH,
        GATE=inputs.gate,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return partial, partial_scores


def sum_partials(inputs: SelectedInputs, partial: tuple[Tensor, Tensor], places_until: Tensor, first_head: int) -> None:
    """Adds up the partial sums of each key, in place, for the KV heads from ``first_head`` on."""
    batch, part_heads, places, _, d_pad = partial[0].shape
    tokens = inputs.exit.shape[2]
    if tokens <= STRETCH:
        return  # One stretch, one partial sum a key.
    key_tiles = cdiv(tokens, SUM_KEYS)
    launch(
        selected_bwd_sum_kernel,
        key_tiles * part_heads * batch,
        (*partial, inputs.exit, places_until),
        (tokens, inputs.window, key_tiles, first_head, part_heads, places),
        SELECTIONS=inputs.scores.shape[1],
        D_PAD=d_pad,
        KEYS=SUM_KEYS,
        PARTS=SUM_PARTS,
        STRETCH=STRETCH,
    )


def _shape(inputs: SelectedInputs) -> dict[str, Any]:
    head_dim, kv_heads = inputs.query.shape[3], inputs.key.shape[1]
    return {
        "GROUP": inputs.query.shape[1] // kv_heads,
        "SELECTIONS": inputs.scores.shape[1],
        "D": head_dim,
        "D_PAD": pad_head_dim(head_dim),
        "PRECISION": "ieee",
    }


def _setup(inputs: SelectedInputs, stretches: KeyLists, doc_start: Tensor | None) -> tuple[Call, Selection]:
    """What the kernels over rows are given."""
    lists, scores = tile_lists(inputs, stretches, doc_start)
    selection = Selection(scores, inputs.threshold, inputs.exit, doc_start, inputs.window, inputs.gate)
    return Call(*inputs[:3], inputs.scale, lists), selection


def document_rows(inputs: SelectedInputs) -> Bounds:
    query, cu_seqlens = inputs.query, inputs.cu_seqlens
    if cu_seqlens is None:
        return Bounds(None, None)
    return Bounds(*known_bounds(query.shape[2], cu_seqlens, query.device))


def row_stats(inputs: SelectedInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp (of base 2), delta and threshold of the rows, padded to whole tiles."""
    batch, heads, tokens, head_dim = out.shape
    selections = inputs.threshold.shape[1]
    tiles = cdiv(tokens, TILE)
    padded_lse, padded_delta = torch.empty(
        (2, batch, heads, tiles * TILE), dtype=torch.float32, device=out.device
    ).unbind()
    padded_threshold = torch.empty((batch, selections, tiles * TILE), dtype=torch.float32, device=out.device)
    launch(
        selected_bwd_stats_kernel,
        tiles * heads * batch,
        (out, grad_out, lse, inputs.threshold, padded_lse, padded_delta, padded_threshold),
        (
            *out.stride()[:3],
            *grad_out.stride()[:3],
            tokens,
            tiles * TILE,
            tiles,
        ),
        HEADS=heads,
        SELECTIONS=selections,
        D=head_dim,
        D_PAD=pad_head_dim(head_dim),
        BLOCK_M=TILE,
        num_warps=8,
    )
    return padded_lse, padded_delta, padded_threshold


def find_places(inputs: SelectedInputs) -> Tensor:
    """Of each key, how many partial sums there are up to its last, int32 ``[B, Hs, N]``."""
    batch, selections, tokens = inputs.exit.shape
    places_until = torch.empty_like(inputs.exit)
    launch(
        selected_bwd_places_kernel,
        batch * selections,
        (inputs.exit, places_until),
        (tokens, inputs.window),
        STRETCH=STRETCH,
        BLOCK=min(PLACES_KEYS, next_power_of_2(tokens)),
        num_warps=8,
    )
    return places_until


def most_places(inputs: SelectedInputs, stretches: KeyLists) -> int:
    """How many partial sums there can be."""
    tokens, count = inputs.exit.shape[2], stretches.keys.shape[2]
    # At the first row of a stretch, that many are selected at most; every key enters once.
    return count * min(inputs.sinks + inputs.topk, tokens) + tokens


def part_heads_of(batch: int, kv_heads: int, places: int, d_pad: int) -> int:
    head_bytes = batch * places * (2 * d_pad + 1) * 4
    return max(1, min(kv_heads, PARTIAL_BYTES // head_bytes))


def sum_heads(grad: Tensor, selections: int) -> Tensor:
    """The gradient of what heads share, summed over them in their order."""
    batch, heads, tokens = grad.shape
    return grad if heads == selections else grad.view(batch, selections, heads // selections, tokens).sum(2)
