"""Calls of attention over lists of keys: random segments and lists, and the mask by its definition, row by row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from attention_oracle import make_inputs
from torch import Tensor

PACKED = (0, 1, 12, 30, 30, 110, 177)


class Case(NamedTuple):
    """The arguments of one call: ``query, key, value``, then ``lists, counts, cu_segments``, then the options."""

    trained: tuple[Tensor, Tensor, Tensor]
    lists: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]


def cut(length: int, generator: torch.Generator, prefix: int = 0, sizes: tuple[int, ...] = (1, 3, 8, 16)) -> list[int]:
    """Ends of segments of random sizes within a document of ``length`` rows; the first holds the prefix too."""
    ends = [0]
    while ends[-1] < length:
        size = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
        ends.append(min(ends[-1] + size + (prefix if len(ends) == 1 else 0), length))
    return ends[1:]


def make_case(
    query_heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 177,
    *,
    capacity: int = 12,
    window: int = 0,
    sinks: int = 0,
    granule: int = 1,
    bounds: tuple[int, ...] | None = None,
    prefix: int = 0,
    skip: int = 1,
    sizes: tuple[int, ...] = (1, 3, 8, 16),
    **options: Any,
) -> Case:
    """Random tensors; each segment lists up to ``capacity`` random keys of what lies before its computed rows. The
    first of a document skips ``prefix`` rows more. Places past a list's count hold nonsense."""
    trained = make_inputs(query_heads, kv_heads, tokens, **options)
    generator = torch.Generator().manual_seed(3)
    cu, skips, starts = [0], [], []
    for start, stop in pairwise(bounds or (0, tokens)):
        for end in cut(stop - start, generator, prefix, sizes):
            skips.append(skip + (prefix if not starts or starts[-1] != start else 0))
            starts.append(start)
            cu.append(start + end)
    batch, segments = trained[0].shape[0], len(skips)
    lists = torch.full((batch, kv_heads, segments, capacity), 2**30, dtype=torch.int32)
    counts = torch.zeros((batch, kv_heads, segments), dtype=torch.int32)
    for b in range(batch):
        for h in range(kv_heads):
            for g in range(segments):
                there = -(-(min(cu[g] + skips[g], cu[g + 1]) - starts[g]) // granule)
                count = min(int(torch.randint(capacity // 2, capacity + 1, (1,), generator=generator)), there)
                lists[b, h, g, :count] = torch.randperm(there, generator=generator)[:count]
                counts[b, h, g] = count
    skip_each = torch.tensor(skips, dtype=torch.int32)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    own = {"skip": skip_each, "window": window, "sinks": sinks, "granule": granule, "cu_seqlens": cu_seqlens}
    return Case(trained, (lists, counts, torch.tensor(cu, dtype=torch.int32)), own)


def seen_keys(case: Case) -> Tensor:
    """bool ``[B, Hkv, N, N]``, a loop over rows and entries that shares no code with ours."""
    key = case.trained[1]
    lists, counts, cu = (tensor.tolist() for tensor in case.lists)
    o = case.options
    starts = [0] if o["cu_seqlens"] is None else o["cu_seqlens"].tolist()
    mask = np.zeros((*key.shape[:2], key.shape[2], key.shape[2]), dtype=bool)
    for g, (low, high) in enumerate(pairwise(cu)):
        document = max(start for start in starts if start <= low) if low < high else 0
        first = low + int(o["skip"][g])
        entries = [
            [{*each[g][: count[g]]} for each, count in zip(*of_batch, strict=True)]
            for of_batch in zip(lists, counts, strict=True)
        ]
        for row in range(first, high):
            for j in range(document, row + 1):
                always = j >= first - o["window"] or j - document < o["sinks"]
                for b in range(key.shape[0]):
                    for h in range(key.shape[1]):
                        mask[b, h, row, j] = always or (j - document) // o["granule"] in entries[b][h]
    return torch.from_numpy(mask)
