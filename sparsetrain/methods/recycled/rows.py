"""The attention of a packed row: rows that attend fully, their choices, and the rows that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from sparsetrain_kernels import causal_attention, listed_attention, put_rows, take_rows
from torch import Tensor

from sparsetrain.methods.recycled.choice import choose
from sparsetrain.methods.recycled.gate import choosing_rows
from sparsetrain.methods.recycled.rules import Rules
from sparsetrain.methods.recycled.segments import Segments

Observe = Callable[..., None]


def settled(rules: Rules, query: Tensor, segments: Segments) -> Segments:
    """The segments of a layer with queries ``[1, Hq, N, D]``: those given, where similar ones need no new choice joined
    to the one before."""
    if rules.similarity is None:
        return segments
    return segments.keep(choosing_rows(query[0, :, segments.starts.long()], segments.documents, rules.similarity))


def attend_rows(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: Mapping[str, Any],
    observe: Observe | None = None,
) -> Tensor:
    """The output of one row, ``[1, Hq, N, D]``.

    Args:
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.
        segments: On their device.
        options: Those of :meth:`Method.attend` that are supported.
        observe: Is given what telemetry counts.
    """
    scale = options.get("scale") or query.shape[3] ** -0.5
    cu_seqlens = options.get("cu_seqlens")
    shared: dict[str, Any] = {"cu_seqlens": cu_seqlens, "scale": scale}
    segments = settled(rules, query, segments)
    starts = segments.starts.long()
    others, asked = take_rows(query, starts)
    full, lse = causal_attention(asked, key, value, query_positions=segments.starts, return_lse=True, **shared)
    lists, counts = choose(rules, asked.detach(), key.detach(), lse.detach(), segments, cu_seqlens, scale)
    skip = segments.starts - segments.bounds[:-1] + 1
    listed = {"skip": skip, "window": rules.recent, "sinks": rules.sinks, **shared}
    out, out_lse = listed_attention(others, key, value, lists, counts, segments.bounds, return_lse=True, **listed)
    if observe is not None:
        observe(query.detach(), key.detach(), value.detach(), out_lse.detach(), segments, cu_seqlens, scale)
    out = put_rows(out, starts, full)
    prompts = segments.prompts.long()
    if len(prompts) == 0:
        return out
    # A prompt sees nothing outside itself.
    own = (tensor[:, :, prompts] for tensor in (query, key, value))
    return put_rows(out, prompts, causal_attention(*own, cu_seqlens=segments.prompt_bounds, scale=scale))


def keys_of_rows(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    segments: Segments,
    options: Mapping[str, Any],
) -> Tensor:
    """The keys that some rows of one document read, bool ``[Hkv, R, N]``.

    Args:
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.
        rows: int64 ``[R]``.
        segments, options: As in :func:`attend_rows`.
    """
    scale = options.get("scale") or query.shape[3] ** -0.5
    cu_seqlens = options.get("cu_seqlens")
    segments = settled(rules, query, segments)
    index = torch.searchsorted(segments.starts.long(), rows, right=True) - 1
    # Rows before the first choice are a prompt, and attend fully as those that choose do.
    used, of = index.clamp(min=0).unique(return_inverse=True)
    part = replace(segments, starts=segments.starts[used], documents=segments.documents[used])
    starts = part.starts.long()
    shared: dict[str, Any] = {"query_positions": part.starts, "cu_seqlens": cu_seqlens, "scale": scale}
    asked = query[:, :, starts].contiguous()
    _, lse = causal_attention(asked, key, value, return_lse=True, **shared)
    lists, counts = choose(rules, asked, key, lse, part, cu_seqlens, scale)

    length = key.shape[2]
    place, row, start = torch.arange(length, device=key.device), rows[:, None], starts[of][:, None]
    unused = torch.arange(lists.shape[3], device=key.device) >= counts[0, :, :, None]
    chosen = torch.zeros(*counts.shape[1:], length + 1, dtype=torch.bool, device=key.device)
    chosen.scatter_(2, lists[0].long().masked_fill(unused, length), True)
    seen = chosen[:, of, :length] | (place > start - rules.recent) | (place < rules.sinks)
    return (seen | (row <= start)) & (place <= row)
