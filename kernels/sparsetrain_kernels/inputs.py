"""The arguments all attention operations share, checked once."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_number, check_tensors


class Document(NamedTuple):
    """One sequence inside the tensors. Positions count from the document's own start."""

    row: int
    """Its first row in ``query``."""
    rows: int
    """Its number of query rows."""
    position: int
    """Position of its first query row."""
    key: int
    """The row of its position 0 in ``key`` and ``value``."""


class AttentionOptions(TypedDict, total=False):
    """The optional arguments of every attention operation; ``block_pattern_attention`` describes them."""

    cu_seqlens: Tensor | None
    q_start: int | None
    scale: float | None
    softcap: float | None
    sink_logits: Tensor | None


def consecutive_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the elements of a row do not follow one another, as kernels want them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_major(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor, or a copy whose elements follow one another as its shape says, for kernels that take no strides.

    ``sort``, ``cumsum``, ``where``, ``nan_to_num`` and ``empty_like`` keep the strides of their input: what is made of
    a transposed tensor is transposed too. So this comes before them.
    """
    return tuple(tensor.contiguous() for tensor in tensors)


def document_bounds(length: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the document of each token starts and ends, int32 ``[N]`` each. Without ``cu_seqlens`` there is one."""
    if cu_seqlens is None:
        start = torch.zeros(length, dtype=torch.int32, device=device)
        return start, start + length
    bounds = cu_seqlens.to(device)
    token = torch.arange(length, dtype=torch.int32, device=device)
    document = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    return bounds.take(document), bounds.take(document + 1)


class AttentionInputs(NamedTuple):
    """Checked arguments of one attention call. The values of ``cu_seqlens`` are not among what is checked: they may
    lie on a device."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens: Tensor | None
    q_start: int
    scale: float
    softcap: float | None
    sink_logits: Tensor | None

    def documents(self) -> tuple[Document, ...]:
        """The sequences in the tensors. Reads ``cu_seqlens`` on the host.

        Raises:
            ValueError: ``cu_seqlens`` does not rise from 0 to the number of tokens.
        """
        if self.cu_seqlens is None:
            return (Document(0, self.query.shape[2], self.q_start, 0),)
        bounds, rows = self.cu_seqlens.tolist(), self.query.shape[2]
        if bounds[:1] != [0] or bounds[-1] != rows or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the number of tokens, {rows}")
        return tuple(Document(a, b - a, 0, a) for a, b in pairwise(bounds) if b > a)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    q_start: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> AttentionInputs:
    """Check shapes, dtypes and ranges and fill in the defaults. Under autocast, q, k and v take its dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    check_tensors(query=query, key=key, value=value)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check_tensors(query, key, value)
    batch, query_heads, rows, head_dim = query.shape
    keys = key.shape[2]

    if cu_seqlens is None:
        q_start = keys - rows if q_start is None else q_start
        if not 0 <= q_start <= keys - rows:
            raise ValueError(
                f"q_start={q_start} does not fit: {rows} query rows and {keys} keys allow 0 to {keys - rows}"
            )
    else:
        _check_packed(query, cu_seqlens, batch, keys, q_start)
        (cu_seqlens,) = row_major(cu_seqlens)
        q_start = 0

    check_factors(scale, softcap)
    if sink_logits is not None:
        check_tensors(sink_logits=sink_logits)
        if sink_logits.shape != (query_heads,):
            raise ValueError(
                f"sink_logits has shape {tuple(sink_logits.shape)}, expected one logit a query head: ({query_heads},)"
            )
        (sink_logits,) = row_major(sink_logits)
    scale = head_dim**-0.5 if scale is None else float(scale)
    return AttentionInputs(query, key, value, cu_seqlens, q_start, scale, softcap, sink_logits)


def check_factors(scale: float | None, softcap: float | None) -> None:
    """What multiplies and what bounds the logits.

    Raises:
        ValueError: one of them is not positive.
    """
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is not None:
            check_number(name, factor)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be positive, or None for head_dim ** -0.5")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no soft cap")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [batch, heads, tokens, head_dim]")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating-point dtype")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, but query is {query.dtype} on {query.device}"
            )
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same shape")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head_dim")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"query has {query.shape[1]} heads, which is no multiple of the {key.shape[1]} heads of key")
    if not 1 <= query.shape[2] <= key.shape[2]:
        raise ValueError(f"query has {query.shape[2]} rows; expected at least 1 and at most the {key.shape[2]} keys")


def _check_packed(query: Tensor, cu_seqlens: Tensor, batch: int, keys: int, q_start: int | None) -> None:
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise TypeError(
            f"cu_seqlens is {cu_seqlens.dtype} with {cu_seqlens.dim()} dimensions, expected int32 [documents + 1]"
        )
    rows = query.shape[2]
    if batch != 1 or rows != keys or q_start:
        raise ValueError(
            f"cu_seqlens needs batch 1, as many keys as query rows and no q_start; "
            f"got batch {batch}, {rows} query rows, {keys} keys, q_start={q_start}"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens={cu_seqlens.tolist()} holds no document, expected at least its two bounds")
