"""Launches the kernels of a step. Everything follows from shapes; no tensor is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.block_decode.triton.configs import choose_config, choose_splits, multiprocessors
from sparsetrain_kernels.block_decode.triton.launch import NUM_WARPS, merge
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device, pad_head_dim
from sparsetrain_kernels.sparsek_decode.slots import SparseKSlots
from sparsetrain_kernels.sparsek_decode.triton.attention import sparsek_decode_attention_kernel
from sparsetrain_kernels.sparsek_decode.triton.update import sparsek_decode_update_kernel

HELD = 8192
"""The longest buffer that a program keeps in registers, and places that it looks at in one go."""
BLOCK = 4096
"""Entries of a longer one that it reads at a time."""
LONGEST_TILE = 128
"""Slots follow one another without end, as far as the size of a tile is concerned."""


def update(key: Tensor, value: Tensor, scores: Tensor, slots: SparseKSlots, topk: int, window: int, sinks: int) -> None:
    """As :func:`sparsetrain_kernels.sparsek_decode.reference.update`."""
    batch, selections, entries = slots.buffer.shape
    heads, head_dim = slots.keys.shape[1], slots.keys.shape[3]
    heads_per_selection = heads // selections
    with on_device(key):
        launch(
            sparsek_decode_update_kernel,
            batch * selections,
            (key, value, scores, *slots),
            (*key.stride()[:2], *value.stride()[:2], *scores.stride()[:2]),
            TOPK=topk,
            WINDOW=window,
            SINKS=sinks,
            ENTRIES=entries,
            SELECTIONS=selections,
            SHARE=heads_per_selection,
            SHARE_PAD=next_power_of_2(heads_per_selection),
            D=head_dim,
            D_PAD=next_power_of_2(head_dim),
            PLACES=at_a_time(topk),
            BUFFER=at_a_time(entries),
            # 512 entries a warp stay in registers.
            num_warps=min(max(at_a_time(entries) // 512, 4), 16),
        )


def at_a_time(entries: int) -> int:
    """Entries of a row that a program reads in one go: all of them, padded to a power of two, if they fit."""
    return next_power_of_2(entries) if entries <= HELD else BLOCK


def attend(
    query: Tensor, slots: SparseKSlots, topk: int, sinks: int, gate: str, scale: float, kept: Tensor | None
) -> Tensor:
    """As :func:`sparsetrain_kernels.sparsek_decode.reference.attend`."""
    batch, query_heads, _, head_dim = query.shape
    heads, count = slots.keys.shape[1:3]
    group, d_pad = query_heads // heads, pad_head_dim(head_dim)
    config = choose_config(query.dtype, d_pad, LONGEST_TILE, group, False)
    programs = batch * heads * cdiv(group, config.block_m)
    splits = choose_splits(programs, cdiv(count, config.block_n), multiprocessors(query.device))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partial = out
    if splits > 1:
        partial = torch.empty((batch, query_heads, splits, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty((batch, query_heads, splits), dtype=torch.float32, device=query.device)
    with on_device(query):
        launch(
            sparsek_decode_attention_kernel,
            programs * splits,
            (
                *(query, slots.keys, slots.values, slots.scores, slots.threshold, slots.read),
                *(None if kept is None else kept.view(torch.uint8), partial, partial_lse),
            ),
            (*query.stride()[:2], splits, scale),
            TOPK=topk,
            WINDOW=count - topk - sinks,
            SINKS=sinks,
            KV_HEADS=heads,
            GROUP=group,
            SELECTIONS=slots.positions.shape[1],
            D=head_dim,
            D_PAD=d_pad,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GATE=gate,
            KEPT=kept is not None,
            PRECISION="ieee",
            num_warps=NUM_WARPS,
            num_stages=config.num_stages,
        )
        if splits > 1:
            # A log-sum-exp of all splits, which nobody asks for.
            lse = torch.empty((batch, query_heads), dtype=torch.float32, device=query.device)
            merge(partial, partial_lse, out, lse)
    return out
