"""Which selected keys a stretch of rows reads, as compact ascending lists made on the device.

A key's rows are two integers, so the keys of a stretch are those whose range meets it: at most ``sinks + topk`` are
selected at its first row, and each further row lets one more in. Lists of long stretches are made from all the keys
before them, lists of tiles from the list of the stretch around them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.key_lists.triton.tiles import KeyLists
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs

STRETCH = 2048
"""Rows of a long stretch: what one program of the backward pass over the selected keys takes."""
TILE = 128
"""Rows that share a list in the kernels that go over rows."""
SCAN = 1024
"""Keys that one step looks at."""


def stretch_lists(inputs: SelectedInputs, doc_start: Tensor | None) -> KeyLists:
    """The lists of long stretches, ascending."""
    return _make(inputs, STRETCH, doc_start, None)


def tile_lists(
    inputs: SelectedInputs, stretches: KeyLists, doc_start: Tensor | None, seen: bool = False
) -> tuple[KeyLists, Tensor]:
    """The lists of tiles, ascending among the keys that all rows see and among the others, with ``seen`` also which
    rows see a key; and the scores, ``[B, Hs, N]``: those of the first tokens infinite, so that their gates are 1."""
    scores = torch.empty_like(inputs.scores) if inputs.sinks else inputs.scores
    return _make(inputs, TILE, doc_start, stretches, scores, seen), scores


def _make(
    inputs: SelectedInputs,
    rows: int,
    doc_start: Tensor | None,
    parents: KeyLists | None,
    scores: Tensor | None = None,
    seen: bool = False,
) -> KeyLists:
    batch, heads, tokens = inputs.exit.shape
    stretches = cdiv(tokens, rows)
    # Whole tiles, which a list is filled up to.
    capacity = cdiv(min(inputs.sinks + inputs.topk + rows, tokens), TILE) * TILE
    device = inputs.exit.device
    keys = torch.empty((batch, heads, stretches, capacity), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, stretches), dtype=torch.int32, device=device)
    whole = None if parents is None else torch.empty_like(counts)
    seen_by = torch.empty_like(keys) if seen else None
    launch(
        select_keys_kernel,
        stretches * heads * batch,
        (
            inputs.exit,
            doc_start,
            None if parents is None else parents.keys,
            None if parents is None else parents.counts,
            keys,
            counts,
            whole,
            seen_by,
            inputs.scores,
            scores,
        ),
        (
            tokens,
            inputs.window,
            inputs.sinks,
            stretches,
            capacity,
            0 if parents is None else parents.keys.shape[2],
            0 if parents is None else parents.keys.shape[3],
        ),
        ROWS=rows,
        PARENT_ROWS=rows if parents is None else parents.rows,
        PACKED=doc_start is not None,
        FROM_PARENT=parents is not None,
        SINKS=scores is not None and inputs.sinks > 0,
        SEEN=seen,
        FILL=TILE,
        SCAN=min(SCAN, next_power_of_2(tokens)),
    )
    return KeyLists(keys, counts, rows, whole=whole, seen=seen_by)


@triton.jit
def select_keys_kernel(
    exit_ptr,
    doc_start_ptr,
    parent_keys_ptr,
    parent_counts_ptr,
    keys_ptr,
    counts_ptr,
    whole_ptr,
    seen_ptr,
    scores_ptr,
    scores_or_inf_ptr,
    tokens,
    window,
    sinks,
    stretches,
    capacity,
    parents,
    parent_capacity,
    ROWS: tl.constexpr,
    PARENT_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    FROM_PARENT: tl.constexpr,
    SINKS: tl.constexpr,
    SEEN: tl.constexpr,
    FILL: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One list; of a list from a longer stretch's, also how many keys all rows see, which come first; with ``SINKS``,
    also the scores of its rows, infinite for the first tokens of documents; with ``SEEN``, which of the rows see each
    key: the first, counted from the list's first row, in the low 16 bits, their number above them. The last
    ``FILL`` places of a list are filled up with its first row, which none of them sees there. Grid: stretches fastest,
    then heads and the batch."""
    stretch = tl.program_id(0) % stretches
    pair = (tl.program_id(0) // stretches).to(tl.int64)
    first = stretch * ROWS
    last = tl.minimum(first + ROWS, tokens)
    exit_ptr += pair * tokens
    if SINKS:
        row = first + tl.arange(0, ROWS)
        score = tl.load(scores_ptr + pair * tokens + row, mask=row < last, other=0.0)
        position = row - tl.load(doc_start_ptr + row, mask=row < last, other=0) if PACKED else row
        score = tl.where(position < sinks, float("inf"), score)
        tl.store(scores_or_inf_ptr + pair * tokens + row, score, mask=row < last)
    if FROM_PARENT:
        parent = pair * parents + first // PARENT_ROWS
        parent_keys_ptr += parent * parent_capacity
        start = 0
        end = tl.load(parent_counts_ptr + parent)
    else:
        # Keys of earlier documents are gone, and later keys have not left the window.
        start = tl.load(doc_start_ptr + first) if PACKED else 0
        end = tl.maximum(last - window, 0)
    whole = 0
    if FROM_PARENT:
        for step in range(start, end, SCAN):
            _, _, is_whole, _ = _look_up(
                exit_ptr, parent_keys_ptr, step + tl.arange(0, SCAN), end, window, first, last, FROM_PARENT
            )
            whole += tl.sum(is_whole.to(tl.int32))
    place = pair * stretches + stretch
    keys_ptr += place * capacity
    if SEEN:
        seen_ptr += place * capacity
    seen_whole, seen = 0, whole
    for step in range(start, end, SCAN):
        key, is_listed, is_whole, rows = _look_up(
            exit_ptr, parent_keys_ptr, step + tl.arange(0, SCAN), end, window, first, last, FROM_PARENT
        )
        if FROM_PARENT:
            ones = is_whole.to(tl.int32)
            index = seen_whole + tl.cumsum(ones, 0) - ones
            tl.store(keys_ptr + index, key, mask=is_whole & (index < capacity))
            if SEEN:
                tl.store(seen_ptr + index, rows, mask=is_whole & (index < capacity))
            seen_whole += tl.sum(ones)
            is_listed = is_listed & (is_whole == 0)
        others = is_listed.to(tl.int32)
        index = seen + tl.cumsum(others, 0) - others
        tl.store(keys_ptr + index, key, mask=is_listed & (index < capacity))
        if SEEN:
            tl.store(seen_ptr + index, rows, mask=is_listed & (index < capacity))
        seen += tl.sum(others)
    index = seen + tl.arange(0, FILL)
    until = tl.minimum(tl.cdiv(seen, FILL) * FILL, capacity)
    tl.store(keys_ptr + index, first, mask=index < until)
    if SEEN:
        tl.store(seen_ptr + index, 0, mask=index < until)
    # Exits that no selection of topk keys has could list more than that.
    tl.store(counts_ptr + place, tl.minimum(seen, capacity))
    if FROM_PARENT:
        tl.store(whole_ptr + place, tl.minimum(whole, capacity))


@triton.jit
def _look_up(exit_ptr, parent_keys_ptr, index, end, window, first, last, FROM_PARENT: tl.constexpr):
    """The keys at places ``index``, which of them rows ``first`` to ``last - 1`` read, which are read by all, and the
    rows that read them, of up to 2^15."""
    inside = index < end
    key = index
    if FROM_PARENT:
        key = tl.load(parent_keys_ptr + index, mask=inside, other=0)
    exit = tl.load(exit_ptr + key, mask=inside, other=0)
    enter = key + window
    is_listed = inside & (exit > enter) & (exit > first) & (enter < last)
    begin = tl.maximum(enter, first)
    rows = (begin - first) | (tl.minimum(exit, last) - begin) << 16
    return key, is_listed, is_listed & (enter <= first) & (exit >= last), rows
