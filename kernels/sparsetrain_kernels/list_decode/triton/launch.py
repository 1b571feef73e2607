"""Launches the decoding kernels over lists. Everything follows from shapes; no tensor is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.block_decode.triton.configs import multiprocessors
from sparsetrain_kernels.inputs import consecutive_rows, row_major
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device, pad_head_dim
from sparsetrain_kernels.list_decode.inputs import ListedInputs
from sparsetrain_kernels.list_decode.triton import kernels
from sparsetrain_kernels.list_decode.triton.configs import choose_programs, choose_step, choose_tiles

NUM_WARPS = 4


def decode(call: ListedInputs) -> tuple[Tensor, Tensor]:
    """``out [B, Hq, rows, D]`` in the query's dtype, and the log-sum-exp, fp32 ``[B, Hq, rows]``."""
    query, key, value = consecutive_rows(call.query), call.key_cache, call.value_cache
    batch, heads, rows, head_dim = query.shape
    kv_heads, page_size = key.shape[1:3]
    lists, counts, lengths = row_major(call.lists, call.counts, call.lengths)
    recents = None if call.recents is None else row_major(call.recents)[0]
    since = None if call.since is None else row_major(call.since)[0]
    sink_logits = None if call.sink_logits is None else row_major(call.sink_logits)[0]
    table = consecutive_rows(call.block_table)
    items, capacity, group = batch * kv_heads, lists.shape[2], heads // kv_heads
    config = choose_tiles(query.dtype, pad_head_dim(head_dim), group * rows)
    row_tiles = cdiv(group * rows, config.block_m)
    programs = choose_programs(
        items, table.shape[1] * page_size, config.block_n, row_tiles, multiprocessors(query.device)
    )
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "ROWS": rows,
        "D": head_dim,
        "D_PAD": pad_head_dim(head_dim),
        "BLOCK_N": config.block_n,
        "ITEMS_PAD": max(16, next_power_of_2(items)),
        "RECENTS": recents is not None,
        "SINCE": since is not None,
        "num_warps": NUM_WARPS,
    }
    bounds = (capacity, items, programs, call.recent, call.sinks)
    places = (programs + items - 1, group * rows)
    partial = torch.empty((*places, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(places, dtype=torch.float32, device=query.device)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device(query):
        launch(
            kernels.listed_decode_kernel,
            programs * row_tiles,
            (query, key, value, lists, counts, lengths, recents, since, table, partial, partial_lse),
            (
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                table.stride(0),
                *bounds,
                call.scale,
                call.softcap or 0.0,
            ),
            PAGE=page_size,
            BLOCK_M=config.block_m,
            SOFTCAP=call.softcap is not None,
            PRECISION="ieee",
            num_stages=config.num_stages,
            **shape,
        )
        launch(
            kernels.merge_parts_kernel,
            lse.numel(),
            (partial, partial_lse, counts, lengths, recents, since, sink_logits, out, lse),
            bounds,
            SINK_LOGITS=sink_logits is not None,
            STEP=choose_step(programs, items),
            **shape,
        )
    return out, lse
