"""The arguments of a decoding call over lists, checked once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_tensors
from sparsetrain_kernels.block_decode.inputs import MAX_ROWS, check_decode_inputs


class ListedInputs(NamedTuple):
    """Checked arguments. No value of an integer tensor is among what is checked: they may lie on a device."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    lists: Tensor
    counts: Tensor
    lengths: Tensor
    block_table: Tensor
    recents: Tensor | None
    """Where each sequence has its own."""
    since: Tensor | None
    """Tokens of each sequence when its lists were made: all later ones are attended in any case."""
    recent: int
    sinks: int
    scale: float
    softcap: float | None
    sink_logits: Tensor | None


def check_listed_inputs(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lists: Tensor,
    counts: Tensor,
    *,
    lengths: Tensor,
    block_table: Tensor,
    sinks: int,
    recent: int | Tensor,
    since: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> ListedInputs:
    """Check shapes, dtypes and ranges and fill in the defaults.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    check_tensors(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        lists=lists,
        counts=counts,
        lengths=lengths,
        block_table=block_table,
    )
    if query.dim() == 4 and not 1 <= query.shape[2] <= MAX_ROWS:
        raise ValueError(f"query has {query.shape[2]} rows a sequence; decoding takes 1 to {MAX_ROWS}")
    page_size = key_cache.shape[2] if key_cache.dim() == 4 else 1
    checked = check_decode_inputs(
        query,
        key_cache,
        value_cache,
        # Any multiple of the page: there is no pattern.
        page_size * MAX_ROWS,
        lengths=lengths,
        block_table=block_table,
        max_length=None,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        window=None,
    )
    each = (query.shape[0], key_cache.shape[1])
    if lists.dim() != 3 or lists.shape[:2] != each:
        raise ValueError(f"lists has shape {tuple(lists.shape)}, expected [{each[0]}, {each[1]}, capacity]")
    if counts.shape != each:
        raise ValueError(f"counts has shape {tuple(counts.shape)}, expected {each}, a number a list")
    recents = recent if isinstance(recent, Tensor) else None
    if since is not None:
        check_tensors(since=since)
    for name, tensor in (("lists", lists), ("counts", counts), ("recent", recents), ("since", since)):
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.device != query.device):
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, expected int32 on {query.device}")
    if isinstance(recent, Tensor):
        if recent.shape != each[:1]:
            raise ValueError(f"recent has shape {tuple(recent.shape)}, expected {each[:1]}, a number a sequence")
        recent = 0
    if since is not None and since.shape != each[:1]:
        raise ValueError(f"since has shape {tuple(since.shape)}, expected {each[:1]}, a number a sequence")
    check_count("recent", recent, 0)
    check_count("sinks", sinks, 0)
    return ListedInputs(
        query,
        key_cache,
        value_cache,
        lists,
        counts,
        lengths,
        block_table,
        recents,
        since,
        int(recent),
        sinks,
        checked.scale,
        softcap,
        checked.sink_logits,
    )
