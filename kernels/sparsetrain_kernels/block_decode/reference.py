"""Decoding in plain PyTorch: gathers the listed keys of each sequence and attends to them under an explicit mask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.block_decode.inputs import DecodeInputs
from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.masked import masked_attention


def decode_by_gathering(call: DecodeInputs, lists: BlockLists) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, rows, D]`` in the query's dtype and ``lse [B, Hq, rows]``. Reads ``lengths`` on the host.

    Raises:
        ValueError: a length is not 0 to ``max_length``.
    """
    query, rows = call.query, call.query.shape[2]
    lengths = call.lengths.tolist()
    if not all(0 <= length <= call.max_length for length in lengths):
        raise ValueError(f"lengths={lengths} must be 0 to max_length={call.max_length}")
    out = query.new_zeros(query.shape)
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=dtype)
    for sequence, length in enumerate(lengths):
        for query_block in range(max(length - rows, 0) // lists.block, -(-length // lists.block)):
            first = max(query_block * lists.block, length - rows)
            end = min((query_block + 1) * lists.block, length)
            _attend(call, lists, sequence, query_block, range(first, end), length, out, lse)
    return out, lse


def _attend(
    call: DecodeInputs,
    lists: BlockLists,
    sequence: int,
    query_block: int,
    positions: range,
    length: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write the rows at ``positions``, which lie in one block, of one sequence."""
    rows = slice(call.query.shape[2] - length + positions.start, call.query.shape[2] - length + positions.stop)
    own = torch.arange(positions.start, positions.stop, device=out.device)
    kv_heads, group = call.key_cache.shape[1], call.query.shape[1] // call.key_cache.shape[1]
    heads_per_list = 1 if lists.per_head else kv_heads
    for head in range(0, kv_heads, heads_per_list):
        blocks = torch.tensor(lists.key_blocks(query_block, head), device=out.device)
        keys = (blocks[:, None] * lists.block + torch.arange(lists.block, device=out.device)).flatten()
        keys = keys[keys < positions.stop]
        visible = keys <= own[:, None]
        if call.token_window is not None:
            visible &= keys > own[:, None] - call.token_window
        heads, query_heads = slice(head, head + heads_per_list), slice(head * group, (head + heads_per_list) * group)
        sinks = None if call.sink_logits is None else call.sink_logits[query_heads]
        part, part_lse = masked_attention(
            call.query[sequence, query_heads, rows].to(lse.dtype)[None],
            _read(call.key_cache, call.block_table, sequence, heads, keys).to(lse.dtype)[None],
            _read(call.value_cache, call.block_table, sequence, heads, keys).to(lse.dtype)[None],
            visible,
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=sinks,
        )
        out[sequence, query_heads, rows] = part[0].to(out.dtype)
        lse[sequence, query_heads, rows] = part_lse[0]


def _read(cache: Tensor, block_table: Tensor | None, sequence: int, heads: slice, keys: Tensor) -> Tensor:
    """The rows at positions ``keys`` of one sequence, ``[heads, keys, D]``."""
    if block_table is None:
        return cache[sequence, heads].index_select(1, keys)
    page_size = cache.shape[2]
    pages = block_table[sequence, keys // page_size].long()
    return cache[:, heads][pages, :, keys % page_size].transpose(0, 1)
