"""The arguments of an estimate, checked once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_tensors
from sparsetrain_kernels.inputs import check_factors
from sparsetrain_kernels.key_mirror.layout import GRANULE, KeyMirror, check_tensor
from sparsetrain_kernels.key_mirror.op import check_places


class EstimateInputs(NamedTuple):
    """Checked arguments. The values of ``lengths``, ``block_table`` and lists are not among what is checked: they may
    lie on a device."""

    query: Tensor
    mirror: KeyMirror
    lengths: Tensor
    block_table: Tensor
    max_length: int
    scale: float
    softcap: float | None
    page_lists: Tensor | None
    page_counts: Tensor | None
    granule: int
    """Tokens of an entry of ``page_lists``."""
    due: Tensor | None

    @property
    def columns(self) -> int:
        """Scores of a row."""
        return self.max_length if self.page_lists is None else self.page_lists.shape[2] * self.granule


def check_estimate_inputs(
    query: Tensor,
    mirror: KeyMirror,
    *,
    lengths: Tensor,
    block_table: Tensor,
    max_length: int | None,
    scale: float | None,
    softcap: float | None,
    page_lists: Tensor | None,
    page_counts: Tensor | None,
    granule: int,
    due: Tensor | None,
) -> EstimateInputs:
    """Check shapes, dtypes and ranges and fill in the defaults.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    batch = check_query(query)
    if not isinstance(mirror, KeyMirror):
        raise TypeError(f"mirror is a {type(mirror).__name__}, expected a KeyMirror")
    _, kv_heads, page, head_dim = mirror.check(batch, query.device)
    check_heads(query, kv_heads, head_dim, "codes")
    check_places(lengths, block_table, batch, query.device)
    check_due(due, query)
    max_length = check_max_length(max_length, block_table, page)
    check_factors(scale, softcap)
    if (page_lists is None) != (page_counts is None):
        raise ValueError("page_lists and page_counts come together: give both, or neither")
    if granule not in (1, GRANULE):
        raise ValueError(f"granule={granule!r} must be {GRANULE}, or 1 for lists of positions")
    if page_lists is not None and page_counts is not None:
        entries = page_lists.shape[2] if page_lists.dim() == 3 else 0
        if entries == 0:
            raise ValueError(f"page_lists has shape {tuple(page_lists.shape)}, expected [batch, kv heads, entries]")
        check_tensor("page_lists", page_lists, (batch, kv_heads, entries), torch.int32, query.device, strided=True)
        check_tensor("page_counts", page_counts, (batch, kv_heads), torch.int32, query.device, strided=True)
    scale = head_dim**-0.5 if scale is None else float(scale)
    lists = (page_lists, page_counts, granule)
    return EstimateInputs(query, mirror, lengths, block_table, max_length, scale, softcap, *lists, due)


def check_query(query: Tensor) -> int:
    """The number of sequences of a query of one token each.

    Raises:
        TypeError: it is no tensor of floats.
        ValueError: it has the wrong shape, or requires a gradient.
    """
    check_tensors(query=query)
    if query.dim() != 4 or query.shape[2] != 1 or 0 in query.shape:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected [batch, heads, 1, head_dim]")
    if not query.is_floating_point():
        raise TypeError(f"query has dtype {query.dtype}, expected a floating-point dtype")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("query requires a gradient, and an estimate has none: call it under torch.no_grad()")
    return query.shape[0]


def check_heads(query: Tensor, kv_heads: int, head_dim: int, name: str) -> None:
    """The query's heads are those of what ``name`` holds.

    Raises:
        ValueError: their number or their size is another.
    """
    if kv_heads == 0 or query.shape[1] % kv_heads != 0 or query.shape[3] != head_dim:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit the {kv_heads} KV heads of {head_dim} channels that {name} hold"
        )


def check_due(due: Tensor | None, query: Tensor) -> None:
    """A flag for each sequence, or none.

    Raises:
        TypeError: it is no tensor of bool on the query's device.
        ValueError: the shape is another.
    """
    if due is not None:
        check_tensor("due", due, (query.shape[0],), torch.bool, query.device, strided=True)


def check_max_length(max_length: int | None, block_table: Tensor, page: int) -> int:
    """What no length exceeds.

    Raises:
        TypeError: it is no integer.
        ValueError: it is more than there are pages for.
    """
    capacity = block_table.shape[1] * page
    max_length = capacity if max_length is None else max_length
    check_count("max_length", max_length, 1)
    if max_length > capacity:
        raise ValueError(f"max_length={max_length} must be 1 to the {capacity} tokens that block_table has pages for")
    return max_length
