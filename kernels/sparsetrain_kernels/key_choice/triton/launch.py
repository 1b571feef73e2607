"""Launches the kernels of a choice, some rows at a time. Everything follows from shapes; no tensor is read on the
host."""

from __future__ import annotations

import itertools
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.documents import document_tiles, known_bounds
from sparsetrain_kernels.key_choice.chunks import lists_of, row_heads
from sparsetrain_kernels.key_choice.inputs import ChoiceInputs, whole_lists
from sparsetrain_kernels.key_choice.triton import lists
from sparsetrain_kernels.key_choice.triton.lists import top_keys_kernel
from sparsetrain_kernels.key_choice.triton.weights import log_weights_kernel
from sparsetrain_kernels.launching import Config, cdiv, launch, on_device, pad_head_dim

PART_ELEMENTS = 2**27
"""Weights at a time, about 8 bytes each while lists are made of them."""
FULL_ROWS = 128
"""Rows of a part, if so many of one head fit: tiles of rows are then full."""
SPAN: int = lists.SPAN.value
TILE = 512
"""Numbers of a row that one program looks at at a time."""
LIST_WARPS = 4
ALIGNED = 256
"""Columns of a row are a multiple of this, so that its peaks, too, start at a multiple of 16."""
HELD_HEADS = 4
"""Heads of a group, at most, all of whose queries fit into shared memory."""
HELD_BYTES = 200 * 1024
"""Of shared memory, for 128 rows of so many heads of 128 and a ring of tiles of keys, as on Hopper."""


class Part(NamedTuple):
    """Some chosen rows, and where the logarithms of their weights go."""

    first: int
    rows: int
    weights: Tensor
    """fp16 ``[heads, rows, columns]``, as far as it is full."""
    peaks: Tensor
    """fp16 ``[heads, rows, columns // SPAN]``, the same."""
    columns: int


def choose(inputs: ChoiceInputs) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sparsetrain_kernels.key_choice.reference.choose`."""
    batch, kv_heads, keys = inputs.key.shape[:3]
    found = whole_lists(inputs)
    columns = cdiv(keys, ALIGNED) * ALIGNED
    of_head = row_heads(inputs) // kv_heads * columns
    together = max(1, min(kv_heads, PART_ELEMENTS // (of_head * FULL_ROWS)))
    most = min(inputs.query.shape[2], max(1, PART_ELEMENTS // (of_head * together)))
    with on_device(inputs.query):
        new = partial(torch.empty, device=inputs.query.device)
        numbers = together * most * of_head
        weights = new(numbers, dtype=torch.float16)
        peaks = new(numbers // SPAN + TILE, dtype=torch.float16)
        own: tuple[Tensor, ...] = ()
        if inputs.p == 0:
            spans, listed = (new(size, dtype=torch.int32) for size in (numbers // SPAN, numbers))
            own = (spans, listed, new(numbers + TILE, dtype=torch.float16))
        starts, lengths = None, inputs.query_positions + 1
        if inputs.cu_seqlens is not None:
            starts, _ = known_bounds(keys, inputs.cu_seqlens, lengths.device)
            lengths = lengths - starts.take(inputs.query_positions.long())
        for sequence, head in itertools.product(range(batch), range(0, kv_heads, together)):
            some = _of_heads(inputs, sequence, slice(head, head + together))
            into = [whole[sequence, head : head + together] for whole in found]
            for first in range(0, inputs.query.shape[2], most):
                part = Part(first, min(most, inputs.query.shape[2] - first), weights, peaks, columns)
                _weigh(some, part, starts)
                # Of rows that see fewer keys, nothing is read behind them.
                (_list_heaviest if inputs.p == 0 else _list_share)(some, part, lengths, own, into)
    return found


def _of_heads(inputs: ChoiceInputs, sequence: int, heads: slice) -> ChoiceInputs:
    """The choice of some KV heads of a sequence."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    query_heads = slice(heads.start * group, heads.stop * group)
    return inputs._replace(
        query=inputs.query[sequence : sequence + 1, query_heads],
        key=inputs.key[sequence : sequence + 1, heads],
        lse=inputs.lse[sequence : sequence + 1, query_heads],
    )


def _list_heaviest(
    inputs: ChoiceInputs, part: Part, lengths: Tensor, own: tuple[Tensor, ...], into: list[Tensor]
) -> None:
    """The ``capacity`` keys of the largest pooled weights. ``own`` is what the kernel needs beside them."""
    rows, spans = inputs.query.shape[2], part.columns // SPAN
    launch(
        top_keys_kernel,
        inputs.key.shape[1] * part.rows,
        (part.weights, part.peaks, lengths, *own, *into),
        (part.rows, part.first, rows, part.columns, spans, inputs.capacity, inputs.sinks, inputs.window),
        HALF=inputs.width // 2,
        TILE=TILE,
        num_warps=LIST_WARPS,
    )


def _list_share(inputs: ChoiceInputs, part: Part, lengths: Tensor, own: tuple[Tensor, ...], into: list[Tensor]) -> None:
    """The fewest keys that hold a share of the weight."""
    rows, heads, keys = slice(part.first, part.first + part.rows), row_heads(inputs), inputs.key.shape[2]
    by_head = part.weights[: heads * part.rows * part.columns].view(heads, part.rows, part.columns)
    for whole, found in zip(
        into, lists_of(inputs, by_head[..., :keys].transpose(0, 1), lengths[rows], "triton"), strict=True
    ):
        whole[:, rows] = found.transpose(0, 1)


def _weigh(inputs: ChoiceInputs, part: Part, starts: Tensor | None) -> None:
    """Launches the kernel that weighs the keys of a part."""
    query, key = inputs.query, inputs.key
    heads, rows, head_dim = query.shape[1:]
    kv_heads, keys = key.shape[1:3]
    group, is_best = heads // kv_heads, inputs.p == 0
    is_held = is_best and group <= HELD_HEADS and query.dtype != torch.float32
    config = choose_config(query.dtype, pad_head_dim(head_dim), is_held, _shared_memory(query.device))
    tiles, table = _tiles(inputs, part.first, part.rows, config.block_m)
    shares = _shares(kv_heads * tiles, cdiv(keys, config.block_n), query.device)
    numbers = (rows, part.columns, part.columns // SPAN, part.first, part.rows, tiles, shares, inputs.scale)
    launch(
        log_weights_kernel,
        shares * kv_heads * tiles,
        (query, key, inputs.lse, part.weights, part.peaks, inputs.query_positions, starts, table),
        (*query.stride()[1:3], *key.stride()[1:3], *numbers),
        KV_HEADS=kv_heads,
        GROUP=group,
        D=head_dim,
        D_PAD=pad_head_dim(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BEST=is_best,
        HELD=is_held,
        PACKED=table is not None,
        PRECISION="ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def choose_config(dtype: torch.dtype, d_pad: int, is_held: bool, shared: int) -> Config:
    """The configuration for a head dim padded to ``d_pad``, and ``shared`` bytes of shared memory for a program."""
    if dtype == torch.float32:
        return Config(32, 32, 4, 1)
    if is_held and d_pad <= 128 and shared >= HELD_BYTES:
        return Config(128, 64, 8, 3)
    return Config(64, 64, 4, 2)


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have, where NVIDIA's driver says so."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "shared_memory_per_block_optin", 0)


@lru_cache(maxsize=64)
def _shares(row_tiles: int, key_tiles: int, device: torch.device) -> int:
    """Programs that share the keys of a tile of rows: with those of the other tiles, two for each multiprocessor. No
    result depends on it."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    return max(1, min(key_tiles, 2 * processors // row_tiles))


def _tiles(inputs: ChoiceInputs, first: int, rows: int, size: int) -> tuple[int, Tensor | None]:
    """How many tiles of ``size`` rows the rows from ``first`` on have; with packed documents also their bounds."""
    if inputs.cu_seqlens is None:
        return cdiv(rows, size), None
    bounds = torch.searchsorted(inputs.query_positions, inputs.cu_seqlens, out_int32=True)
    most = rows // size + inputs.cu_seqlens.shape[0] - 1
    bounds = bounds.clamp(first, first + rows)
    return most, document_tiles(bounds, size, most)
