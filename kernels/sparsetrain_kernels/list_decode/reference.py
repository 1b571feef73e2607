"""Decoding over lists in plain PyTorch: gathers the keys of a sequence and attends to them under an explicit mask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.list_decode.inputs import ListedInputs
from sparsetrain_kernels.masked import masked_attention


def attend_by_gathering(call: ListedInputs) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, rows, D]`` in the query's dtype and ``lse [B, Hq, rows]``, one sequence at a time. Reads
    ``lengths`` and ``recent`` on the host."""
    query = call.query
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=dtype)
    rows = query.shape[2]
    lengths = call.lengths.tolist()
    recents = [call.recent] * len(query) if call.recents is None else call.recents.tolist()
    if call.since is not None:
        later = (max(length - since, 0) for length, since in zip(lengths, call.since.tolist(), strict=True))
        recents = [recent + more for recent, more in zip(recents, later, strict=True)]
    for sequence, (length, recent) in enumerate(zip(lengths, recents, strict=True)):
        position, is_key = _positions(call, sequence, length, recent)
        key, value, is_key = _read(call, sequence, position, is_key)
        own = torch.arange(length - rows, length, device=query.device)
        visible = is_key[:, None] & (position[:, None] <= own[:, None])
        part, part_lse = masked_attention(
            query[sequence, None].to(dtype),
            key[None].to(dtype),
            value[None].to(dtype),
            visible,
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
        )
        # Rows that see nothing, and those before position 0, which have no sink either.
        group = query.shape[1] // len(visible)
        sees = visible.any(-1).repeat_interleave(group, 0)
        out[sequence] = part[0].masked_fill(~sees[..., None], 0.0).to(out.dtype)
        lse[sequence] = part_lse[0].masked_fill(own < 0, float("-inf"))
    return out, lse


def _positions(call: ListedInputs, sequence: int, length: int, recent: int) -> tuple[Tensor, Tensor]:
    """The positions attended in any case and those listed, ``[Hkv, N]``, and which of them are of keys."""
    lists, counts = call.lists[sequence], call.counts[sequence]
    first = min(call.sinks, length)
    start = min(max(length - recent, first), length)
    always = torch.cat([torch.arange(first), torch.arange(start, length)]).to(lists)
    # Behind the longest list nothing is looked at.
    lists = lists[:, : int(counts.max())]
    listed = torch.arange(lists.shape[1], device=lists.device) < counts[:, None]
    position = torch.cat([always.expand(len(lists), -1), lists.masked_fill(~listed, -1)], 1)
    return position, (position >= 0) & (position < length)


def _read(call: ListedInputs, sequence: int, position: Tensor, is_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values at the positions, ``[Hkv, N, D]``, zeros where there is none, and where there is one."""
    page_size = call.key_cache.shape[2]
    where = position.masked_fill(~is_key, 0)
    page = call.block_table[sequence, where // page_size]
    is_key = is_key & (page >= 0)
    head = torch.arange(len(position), device=position.device)[:, None]
    index = (page.masked_fill(~is_key, 0), head, where % page_size)
    key, value = (cache[index].masked_fill(~is_key[..., None], 0.0) for cache in (call.key_cache, call.value_cache))
    return key, value, is_key
