"""Launches the kernels of a choice, some rows at a time. Everything follows from shapes; no tensor is read on the
host."""

from __future__ import annotations

import itertools

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.documents import document_tiles, known_bounds
from sparsetrain_kernels.key_choice.chunks import pooled_lists, row_heads
from sparsetrain_kernels.key_choice.inputs import ChoiceInputs, whole_lists
from sparsetrain_kernels.key_choice.triton.kernels import log_weights_kernel, pool_positions_kernel
from sparsetrain_kernels.launching import Config, launch, on_device, pad_head_dim

PART_ELEMENTS = 2**27
"""Weights at a time, about 24 bytes each while lists are made of them."""
POOL = 1024
"""Positions that one program pools."""
STEPS = 8
"""Tiles of keys of one program."""


def choose(inputs: ChoiceInputs) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sparsetrain_kernels.key_choice.reference.choose`."""
    query, key, positions = inputs.query, inputs.key, inputs.query_positions
    batch, _, rows, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    heads = row_heads(inputs)
    found = whole_lists(inputs)
    config = choose_config(query.dtype, pad_head_dim(head_dim))
    part = min(rows, max(1, PART_ELEMENTS // (heads * keys)))
    pieces = triton.cdiv(keys, STEPS * config.block_n)
    with on_device(query):
        starts, lengths = None, positions + 1
        if inputs.cu_seqlens is not None:
            starts, _ = known_bounds(keys, inputs.cu_seqlens, query.device)
            lengths = lengths - starts.take(positions.long())
        # Of rows that see fewer keys, nothing is read behind them.
        weights = torch.empty((heads * part * keys,), dtype=torch.float16, device=query.device)
        pooled = torch.empty_like(weights) if inputs.width > 1 else weights
        for sequence, first in itertools.product(range(batch), range(0, rows, part)):
            own = min(part, rows - first)
            tiles, table = _tiles(inputs, first, own, config.block_m)
            launch(
                log_weights_kernel,
                pieces * kv_heads * tiles,
                (query[sequence], key[sequence], inputs.lse[sequence], weights, positions, starts, table),
                (*query.stride()[1:3], *key.stride()[1:3], rows, keys, first, own, tiles, pieces, inputs.scale),
                KV_HEADS=kv_heads,
                GROUP=query.shape[1] // kv_heads,
                D=head_dim,
                D_PAD=pad_head_dim(head_dim),
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                STEPS=STEPS,
                BEST=inputs.p == 0,
                PACKED=table is not None,
                PRECISION="ieee",
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
            of_rows = slice(first, first + own)
            if inputs.width > 1:
                launch(
                    pool_positions_kernel,
                    triton.cdiv(keys, POOL) * heads * own,
                    (weights, lengths[of_rows], pooled),
                    (own, keys, triton.cdiv(keys, POOL)),
                    WIDTH=inputs.width,
                    BLOCK=POOL,
                    num_warps=4,
                )
            by_row = pooled[: heads * own * keys].view(heads, own, keys).transpose(0, 1)
            for whole, lists in zip(found, pooled_lists(inputs, by_row, lengths[of_rows], "triton"), strict=True):
                whole[sequence, :, of_rows] = lists.transpose(0, 1)
    return found


def choose_config(dtype: torch.dtype, d_pad: int) -> Config:
    """The configuration for a head dim padded to ``d_pad``."""
    if dtype == torch.float32:
        return Config(32, 32, 4, 1)
    return Config(64, 64, 4, 2)


def _tiles(inputs: ChoiceInputs, first: int, rows: int, size: int) -> tuple[int, Tensor | None]:
    """How many tiles of ``size`` rows the rows from ``first`` on have; with packed documents also their bounds."""
    if inputs.cu_seqlens is None:
        return triton.cdiv(rows, size), None
    bounds = torch.searchsorted(inputs.query_positions, inputs.cu_seqlens, out_int32=True)
    most = rows // size + inputs.cu_seqlens.shape[0] - 1
    bounds = bounds.clamp(first, first + rows)
    return most, document_tiles(bounds, size, most)
