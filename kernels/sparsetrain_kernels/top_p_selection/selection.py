"""What a selection is asked for, checked once, and what comes of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_number, check_tensors, is_integer

GROUPS = ("union", "max", "mean")
PAGE = 16
"""Tokens of a candidate page."""
ONE = 2**40
"""The mass of a key that has all of the weight. A row sums to about this, so that sums of integers never overflow, and
a key of 131,072 equal ones still has 2^23."""
MOST_COLUMNS = 2**21
"""Scores of a row, at most: masses of as many keys are added without overflow, whatever the log-sum-exp says."""


class PositionLists(NamedTuple):
    """The keys that each KV head of a sequence attends to."""

    lists: Tensor
    """int32 ``[B, Hkv, capacity]``: positions, ascending. What lies behind the count is undefined."""
    counts: Tensor
    """int32 ``[B, Hkv]``: entries of each list."""
    dropped: Tensor
    """int32 ``[B, Hkv]``: keys that were chosen and for which there was no room."""


class SelectionInputs(NamedTuple):
    """Checked arguments. No value of a tensor is among what is checked: they may lie on a device."""

    scores: Tensor
    lse: Tensor | None
    """None where scores of all heads are compared as they are."""
    lengths: Tensor
    page_lists: Tensor | None
    page_counts: Tensor | None
    p_heads: Tensor | None
    """Where each query head has its own."""
    recents: Tensor | None
    """Where each sequence has its own."""
    p: float
    recent: int
    sinks: int
    kv_heads: int
    group: str
    width: int
    """Neighbouring scores of which each key takes the largest; 1 for none."""
    min_keys: int
    capacity: int
    newest: bool
    """Whether the newest of equal keys fill the list, or none of those that do not all fit."""
    due: Tensor | None
    """Which sequences are asked for; None for all."""


def check_selection(
    scores: Tensor,
    lse: Tensor | None,
    p: float | Tensor,
    *,
    lengths: Tensor,
    num_kv_heads: int,
    group: str,
    width: int,
    min_keys: int,
    capacity: int,
    newest: bool,
    sinks: int,
    recent: int | Tensor,
    page_lists: Tensor | None,
    page_counts: Tensor | None,
    due: Tensor | None,
) -> SelectionInputs:
    """Check shapes, dtypes and ranges.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    check_tensors(scores=scores, lengths=lengths)
    if scores.dim() != 3 or 0 in scores.shape:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected [batch, query heads, keys], none of them 0")
    batch, heads, columns = scores.shape
    if columns > MOST_COLUMNS:
        raise ValueError(f"scores has {columns} columns; a row has at most {MOST_COLUMNS}")
    _check("scores", scores, torch.float16, scores.shape, scores)
    if lse is not None:
        check_tensors(lse=lse)
        _check("lse", lse, torch.float32, (batch, heads), scores)
    _check("lengths", lengths, torch.int32, (batch,), scores)
    check_count("num_kv_heads", num_kv_heads, 1, unit="heads")
    if heads % num_kv_heads != 0:
        raise ValueError(f"scores has {heads} heads, which is no multiple of num_kv_heads={num_kv_heads}")
    if group not in GROUPS:
        raise ValueError(f"group={group!r} does not exist; choose one of {', '.join(GROUPS)}")
    check_count("min_keys", min_keys, 0, unit="keys")
    check_count("capacity", capacity, 1, unit="keys")
    check_count("sinks", sinks, 0)
    if (page_lists is None) != (page_counts is None):
        raise ValueError("page_lists and page_counts go together: give both or none")
    if page_lists is not None and page_counts is not None:
        check_tensors(page_lists=page_lists, page_counts=page_counts)
        _check("page_lists", page_lists, torch.int32, (batch, num_kv_heads, -(-columns // PAGE)), scores)
        _check("page_counts", page_counts, torch.int32, (batch, num_kv_heads), scores)
    if due is not None:
        check_tensors(due=due)
        _check("due", due, torch.bool, (batch,), scores)
    recents: Tensor | None = None
    p_heads: Tensor | None = None
    if isinstance(recent, Tensor):
        _check("recent", recent, torch.int32, (batch,), scores)
        recents, recent = recent, 0
    check_count("recent", recent, 0)
    if isinstance(p, Tensor):
        if p.shape not in ((1,), (heads,)):
            raise ValueError(f"p has shape {tuple(p.shape)}, expected (1,) or a share a query head, ({heads},)")
        _check("p", p, torch.float32, p.shape, scores)
        p_heads, p = p.expand(heads), 1.0
    check_number("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} is no share of the weight, 0 to 1")
    return SelectionInputs(
        scores,
        lse,
        lengths,
        page_lists,
        page_counts,
        p_heads,
        recents,
        float(p),
        int(recent),
        sinks,
        num_kv_heads,
        group,
        width,
        min_keys,
        capacity,
        newest,
        due,
    )


def check_into(into: PositionLists, inputs: SelectionInputs) -> None:
    """Tensors that a selection is written into are as large as it is.

    Raises:
        TypeError, ValueError: one of them is not; the message names it.
    """
    each = (inputs.scores.shape[0], inputs.kv_heads)
    shapes = ((*each, inputs.capacity), each, each)
    for name, tensor, shape in zip(PositionLists._fields, into, shapes, strict=True):
        check_tensors(**{f"into.{name}": tensor})
        _check(f"into.{name}", tensor, torch.int32, shape, inputs.scores)
        if not tensor.is_contiguous():
            raise ValueError(f"into.{name} has strides {tensor.stride()}: it is written in place; make it contiguous")


def check_width(width: int) -> None:
    """An odd number of neighbours.

    Raises:
        TypeError, ValueError: it is no integer, or none of these.
    """
    if not is_integer(width) or width < 1 or width % 2 == 0:
        raise ValueError(f"width={width!r} must be an odd number of keys, such as 7, or 1 for no pooling")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], scores: Tensor) -> None:
    if tensor.dtype != dtype or tensor.device != scores.device:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} on {scores.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
