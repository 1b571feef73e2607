"""The arguments of a decoding call, checked once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.inputs import check_factors

MAX_ROWS = 16
"""Query rows of a sequence: a token, or the few that speculative decoding proposes."""


class DecodeInputs(NamedTuple):
    """Checked arguments. The values of ``lengths`` and ``block_table`` are not among what is checked: they may lie on a
    device."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    lengths: Tensor
    block_table: Tensor | None
    max_length: int
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    token_window: int | None = None


def check_decode_inputs(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block: int,
    *,
    lengths: Tensor,
    block_table: Tensor | None,
    max_length: int | None,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    window: int | None,
) -> DecodeInputs:
    """Check shapes, dtypes and ranges and fill in the defaults; ``block`` is the pattern's.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    _check_no_gradient(query=query, key_cache=key_cache, value_cache=value_cache, sink_logits=sink_logits)
    _check_tensors(query, key_cache, value_cache)
    batch, heads, rows, head_dim = query.shape
    if batch == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected at least one sequence")
    if not 1 <= rows <= min(MAX_ROWS, block):
        raise ValueError(
            f"query has {rows} rows a sequence; decoding takes 1 to {min(MAX_ROWS, block)} (at most {MAX_ROWS}, and "
            f"one pattern block of {block}); use block_pattern_attention for more"
        )
    _check_integers("lengths", lengths, (batch,), query)
    if block_table is None:
        if key_cache.shape[0] != batch:
            raise ValueError(
                f"key_cache {tuple(key_cache.shape)} holds {key_cache.shape[0]} sequences and query {batch}; "
                "give block_table if these are pages"
            )
        capacity = key_cache.shape[2]
    else:
        capacity = _check_pages(query, key_cache, block_table, block)
    max_length = capacity if max_length is None else max_length
    if not 1 <= max_length <= capacity:
        raise ValueError(f"max_length={max_length} must be 1 to the {capacity} keys a sequence has room for")
    check_factors(scale, softcap)
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 token (the query's own), or None for no window")
    if sink_logits is not None and (sink_logits.shape != (heads,) or sink_logits.device != query.device):
        raise ValueError(
            f"sink_logits has shape {tuple(sink_logits.shape)} on {sink_logits.device}, expected one logit a query "
            f"head, ({heads},) on {query.device}"
        )
    scale = head_dim**-0.5 if scale is None else float(scale)
    return DecodeInputs(
        query, key_cache, value_cache, lengths, block_table, max_length, scale, softcap, sink_logits, window
    )


def _check_no_gradient(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and decoding has none: call it under torch.no_grad(), or use "
                "block_pattern_attention to train"
            )


def _check_tensors(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    layouts = {"query": "[batch, heads, rows, head_dim]"}
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.dim() != 4:
            layout = layouts.get(name, "[batch or pages, kv heads, keys, head_dim]")
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {layout}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating-point dtype")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, but query is {query.dtype} on {query.device}"
            )
        if tensor is not query and tensor.stride(3) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}: the elements of a key must be consecutive, because a cache is "
                "never copied; make its last stride 1"
            )
    if key_cache.shape != value_cache.shape:
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} must have the same shape"
        )
    if query.shape[3] != key_cache.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} and key_cache {tuple(key_cache.shape)} differ in head_dim")
    if key_cache.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key_cache.shape[1] != 0:
        raise ValueError(
            f"query has {query.shape[1]} heads, which is no multiple of the {key_cache.shape[1]} heads of key_cache"
        )


def _check_pages(query: Tensor, key_cache: Tensor, block_table: Tensor, block: int) -> int:
    """The keys a sequence has room for."""
    page_size = key_cache.shape[2]
    if block_table.dim() != 2:
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}, expected [batch, max_pages]")
    _check_integers("block_table", block_table, (query.shape[0], block_table.shape[1]), query)
    if page_size == 0 or block % page_size != 0:
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} has pages of {page_size} keys, which do not divide the pattern's "
            f"block of {block}; choose a page size that does"
        )
    return block_table.shape[1] * page_size


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    if tensor.dtype != torch.int32 or tensor.device != query.device:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, expected int32 on {query.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}, a row a sequence of query")
