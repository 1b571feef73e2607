"""Which keys a row chooses for the rows behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sparsetrain_kernels import top_k_lists, top_p_lists
from torch import Tensor

from sparsetrain.methods.recycled.rules import Rules
from sparsetrain.methods.recycled.segments import Segments

TOGETHER = 2**24
"""Scores that are computed at once."""
POOLED = 7
"""Neighbours of which a key has the largest weight (2411.05787, section 3)."""


torch.library.define(
    "sparsetrain::recycled_choice",
    "(Tensor query, Tensor key, Tensor lse, Tensor starts, Tensor documents, float scale, int keep, float? p, "
    "int sinks, int recent) -> (Tensor, Tensor)",
)


@torch.no_grad()
def choose(
    rules: Rules, query: Tensor, key: Tensor, lse: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """The keys that each segment's first row chooses.

    Args:
        query: ``[1, Hq, G, D]``, of these rows.
        key: ``[1, Hkv, N, D]``.
        lse: ``[1, Hq, G]``, the log-sum-exp of these rows.

    Returns:
        int32 ``[1, Hkv, G, keep]``, positions that count from the start of the document, and how many there are, int32
        ``[1, Hkv, G]``. What lies behind a count is undefined.
    """
    places = (segments.starts, segments.documents)
    numbers = (rules.keep, rules.p, rules.sinks, rules.recent)
    lists, counts = torch.ops.sparsetrain.recycled_choice(query, key, lse, *places, scale, *numbers)
    return lists, counts


@torch.library.impl("sparsetrain::recycled_choice", "default")
def _choose(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    starts: Tensor,
    documents: Tensor,
    scale: float,
    keep: int,
    p: float | None,
    sinks: int,
    recent: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`choose`; an operation of its own, so that activation checkpointing keeps its result."""
    heads, count = key.shape[1], query.shape[2]
    lists = torch.zeros(count, heads, keep, dtype=torch.int32, device=query.device)
    counts = torch.zeros(count, heads, dtype=torch.int32, device=query.device)
    for part, scores, lengths in _scores(query, key, starts, documents, scale):
        given: dict[str, Any] = {"num_kv_heads": heads, "lengths": lengths, "sinks": sinks, "recent": recent}
        rows = lse[0, :, part].mT.float().contiguous()
        if p is None:
            found = top_k_lists(scores, rows, keep, width=POOLED, **given)
        else:
            found = top_p_lists(scores, rows, p, capacity=keep, min_keys=1, group="union", **given)
        lists[part], counts[part] = found.lists, found.counts
    return lists.transpose(0, 1)[None].contiguous(), counts.mT[None].contiguous()


@torch.library.register_fake("sparsetrain::recycled_choice")
def _choose_shapes(query: Tensor, key: Tensor, lse: Tensor, starts: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    heads, keep = key.shape[1], args[2]
    return starts.new_empty(1, heads, len(starts), keep), starts.new_empty(1, heads, len(starts))


def _scores(
    query: Tensor, key: Tensor, starts: Tensor, documents: Tensor, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Scores of some consecutive rows of one document with its keys, fp16 ``[C, Hq, M]``, and how many keys each row
    has, int32 ``[C]``."""
    heads, rows = key.shape[1], query.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    largest = torch.finfo(torch.float16).max
    firsts, rows_of = documents.tolist(), starts.tolist()
    begin = 0
    while begin < len(rows_of):
        end = begin + 1
        while end < len(rows_of) and firsts[end] == firsts[begin]:
            if (end + 1 - begin) * rows * (rows_of[end] + 1 - firsts[begin]) > TOGETHER:
                break
            end += 1
        part, first = slice(begin, end), firsts[begin]
        keys = key[0, :, first : rows_of[end - 1] + 1].to(wide)
        asked = query[0, :, part].unflatten(0, (heads, -1)).to(wide) * scale
        scores = (asked.flatten(1, 2) @ keys.mT).unflatten(1, (-1, end - begin)).flatten(0, 1)
        lengths = starts[part] - first + 1
        yield part, scores.clamp(-largest, largest).half().transpose(0, 1).contiguous(), lengths.contiguous()
        begin = end
