"""The arguments of attention over lists of keys, checked once."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_tensors
from sparsetrain_kernels.inputs import AttentionInputs, Document, check_inputs, consecutive_rows, row_major


class ListedOptions(TypedDict, total=False):
    """The optional arguments of every operation here; ``listed_attention`` describes them."""

    skip: int | Tensor
    window: int
    sinks: int
    granule: int
    cu_seqlens: Tensor | None
    scale: float | None


class Segment(NamedTuple):
    """One segment's rows that are computed. All numbers are rows of the tensors."""

    number: int
    first: int
    """The first row after those that are skipped."""
    end: int
    document: int
    """The first row of its document."""


class ListedInputs(NamedTuple):
    """Checked arguments of one call. What the integer tensors hold is not checked: they may lie on a device."""

    query: Tensor
    """``[B, Hq, N, D]``; the elements of a row follow one another, in key and value too."""
    key: Tensor
    """``[B, Hkv, N, D]``."""
    value: Tensor
    lists: Tensor
    """int32 ``[B, Hkv, segments, capacity]``, contiguous like the next three."""
    counts: Tensor
    """int32 ``[B, Hkv, segments]``."""
    cu_segments: Tensor
    """int32 ``[segments + 1]``."""
    skip: Tensor
    """int32 ``[segments]``."""
    cu_seqlens: Tensor | None
    """int32 ``[documents + 1]``, on the tensors' device."""
    scale: float
    window: int
    sinks: int
    granule: int

    def documents(self) -> tuple[Document, ...]:
        """The sequences in the tensors. Reads ``cu_seqlens`` on the host.

        Raises:
            ValueError: ``cu_seqlens`` does not rise from 0 to the number of tokens.
        """
        return AttentionInputs(*self[:3], self.cu_seqlens, 0, self.scale, None, None).documents()

    def segments(self) -> list[list[Segment]]:
        """By document, the segments of which some rows are computed. Reads their bounds on the host.

        Raises:
            ValueError: ``cu_segments`` does not rise from 0 to the number of tokens, or a segment is in two documents.
        """
        bounds, rows = self.cu_segments.tolist(), self.query.shape[2]
        if bounds[:1] != [0] or bounds[-1] != rows or bounds != sorted(bounds):
            raise ValueError(f"cu_segments={_short(bounds)} must rise from 0 to the number of tokens, {rows}")
        skips = self.skip.tolist()
        if min(skips) < 0:
            raise ValueError(f"skip={_short(skips)} must not be negative")
        documents = self.documents()
        ends = [document.row + document.rows for document in documents]
        found: list[list[Segment]] = [[] for _ in documents]
        for number, ((start, end), skip) in enumerate(zip(pairwise(bounds), skips, strict=True)):
            place = bisect_right(ends, start)
            if start < end and ends[place] < end:
                raise ValueError(
                    f"segment {number} has rows {start} to {end - 1}, but a document ends before row {ends[place]}; a "
                    f"segment must lie within one document"
                )
            if start + skip < end:
                found[place].append(Segment(number, start + skip, end, documents[place].row))
        return found


def check_listed_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    counts: Tensor,
    cu_segments: Tensor,
    *,
    skip: int | Tensor = 0,
    window: int = 0,
    sinks: int = 0,
    granule: int = 1,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> ListedInputs:
    """Check shapes, dtypes and ranges, fill in the defaults, and lay the tensors out as the operations want them.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    query, key, value, cu_seqlens, _, scale, *_ = check_inputs(query, key, value, cu_seqlens=cu_seqlens, scale=scale)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} rows, but key has {key.shape[2]}; expected as many, a query for each key"
        )
    check_tensors(lists=lists, counts=counts, cu_segments=cu_segments)
    if cu_segments.dim() != 1 or cu_segments.shape[0] < 2:
        raise ValueError(
            f"cu_segments has shape {tuple(cu_segments.shape)}, expected [segments + 1], at least 2 bounds"
        )
    segments = cu_segments.shape[0] - 1
    if not isinstance(skip, Tensor):
        check_count("skip", skip, 0, unit="rows")
        skip = torch.full((segments,), skip, dtype=torch.int32, device=query.device)
    heads = (query.shape[0], key.shape[1], segments)
    if lists.dim() != 4 or lists.shape[:3] != heads or lists.shape[3] < 1:
        raise ValueError(
            f"lists has shape {tuple(lists.shape)}, expected [batch, KV heads, segments, capacity]: {heads} and at "
            f"least 1 place"
        )
    for name, tensor, shape in (("counts", counts, heads), ("skip", skip, (segments,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, tensor in (("lists", lists), ("counts", counts), ("cu_segments", cu_segments), ("skip", skip)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.int32")
    check_count("window", window, 0, "0 keeps no key before the segment")
    check_count("sinks", sinks, 0, "0 keeps no first token")
    check_count("granule", granule, 1, "entries are runs of so many keys")
    if granule & (granule - 1) or granule > 64:
        raise ValueError(f"granule={granule} must be a power of two of at most 64 keys")
    for name, tensor in (("lists", lists), ("counts", counts)):
        if tensor.device != query.device:
            raise TypeError(f"{name} is on {tensor.device}, but query is on {query.device}")
    lists, counts, cu_segments, skip = row_major(lists, counts, cu_segments, skip)
    return ListedInputs(
        consecutive_rows(query),
        consecutive_rows(key),
        consecutive_rows(value),
        lists,
        counts,
        cu_segments.to(query.device),
        skip.to(query.device),
        None if cu_seqlens is None else cu_seqlens.to(query.device),
        scale,
        window,
        sinks,
        granule,
    )


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 16 else f"[{', '.join(map(str, numbers[:8]))}, ..., {numbers[-1]}]"
