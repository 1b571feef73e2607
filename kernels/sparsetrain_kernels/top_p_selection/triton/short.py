"""Selections of short rows: a program holds a whole row of scores in registers, and so reads it once."""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import (
    LARGEST,
    ONE,
    PAGE,
    halve,
    held_threshold,
    mass_of,
    mass_parts,
    number,
    ordered,
    positions,
    row_bounds,
)


@triton.jit
def row_threshold(score, may_list, lse, p, min_keys):
    """The threshold of a row of fp16 scores, -inf where there is no key, as an integer in the order of fp16's
    numbers."""
    keys = tl.where(may_list, ordered(score), -1)
    found = tl.full([], 0, tl.int32)
    if p < 1.0:
        large, small, is_sound = mass_parts(score.to(tl.float32), lse)
        least_mass = tl.ceil(p.to(tl.float64) * ONE).to(tl.int64) - mass_of(may_list == 0, large, small, is_sound)
        found = held_threshold(keys, large, small, is_sound, 0, least_mass, min_keys)
    return found


@triton.jit
def short_threshold_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    due_ptr,
    p_ptr,
    threshold_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    recent,
    sinks,
    min_keys,
    p,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    P_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    DUE: tl.constexpr,
    ROW: tl.constexpr,
):
    """The threshold of a row of up to ``ROW`` scores, int32 ``[B, rows]``. One program a row."""
    batch = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    columns, length, recent_start = row_bounds(
        lengths_ptr,
        recents_ptr,
        page_counts_ptr,
        due_ptr,
        batch,
        kv_head,
        all_columns,
        recent,
        KV_HEADS,
        RECENTS,
        PAGES,
        DUE,
    )
    scores_ptr += batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
    if PAGES:
        page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
    if P_HEADS:
        p = tl.load(p_ptr + head)
    p = tl.full([], 0.0, tl.float32) + p
    lse = tl.load(lse_ptr + tl.program_id(0))
    # By pages, so that each of them is looked up once.
    first = tl.arange(0, ROW // PAGE) * PAGE
    within = tl.arange(0, PAGE)[None, :]
    column = first[:, None] + within
    # The mask ends with the tensor, not with the sequence, so that many scores are loaded at a time.
    score = tl.load(scores_ptr + column, mask=column < all_columns, other=float("-inf"))
    position = column
    if PAGES:
        page = tl.load(page_lists_ptr + first // PAGE, mask=first < columns, other=-1)
        position = page[:, None] * PAGE + within
    score = tl.where((position >= 0) & (position < length), score, float("-inf")).to(tl.float16)
    may_list = (score > float("-inf")) & (position >= sinks) & (position < recent_start)
    tl.store(threshold_ptr + tl.program_id(0), row_threshold(score, may_list, lse, p, min_keys))


@triton.jit
def short_list_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    due_ptr,
    p_ptr,
    threshold_ptr,
    lists_ptr,
    counts_ptr,
    dropped_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    recent,
    sinks,
    min_keys,
    p,
    capacity,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    DUE: tl.constexpr,
    LSE: tl.constexpr,
    POOLED: tl.constexpr,
    SEARCH: tl.constexpr,
    NEWEST: tl.constexpr,
    ROW: tl.constexpr,
):
    """The positions of a KV head's list, ascending, int32 ``[B, Hkv, capacity]``, how many they are, and for how many
    there is no room, int32 ``[B, Hkv]``. One program a KV head.

    With ``POOLED`` the rows of a group are pooled into the log of the largest weight first. With ``SEARCH`` the
    threshold of the one row that is left is found here; otherwise those of the heads are read. Without ``LSE`` their
    log-sum-exps are 0.
    """
    row = tl.program_id(0)
    kv_head = row % KV_HEADS
    batch = row // KV_HEADS
    if DUE:  # noqa: SIM102 (known when compiled)
        if tl.load(due_ptr + batch) == 0:
            return
    columns, length, recent_start = row_bounds(
        lengths_ptr,
        recents_ptr,
        page_counts_ptr,
        due_ptr,
        batch,
        kv_head,
        all_columns,
        recent,
        KV_HEADS,
        RECENTS,
        PAGES,
        False,
    )
    if PAGES:
        page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
    scores_ptr += batch.to(tl.int64) * scores_stride_b + (kv_head * GROUP).to(tl.int64) * scores_stride_h
    column = tl.arange(0, ROW)
    position = positions(page_lists_ptr, column, columns, PAGES)
    exists = (position >= 0) & (position < length)
    may_list = exists & (position >= sinks) & (position < recent_start)
    rank = tl.full([ROW], float("-inf"), tl.float32)
    for member in tl.static_range(GROUP):
        score = tl.load(scores_ptr + column, mask=column < all_columns, other=float("-inf")).to(tl.float32)
        score = tl.where(exists, score, float("-inf"))
        lse = tl.load(lse_ptr + row * GROUP + member) if LSE else 0.0
        weight = tl.where(score > float("-inf"), tl.maximum(score - lse, -LARGEST), float("-inf"))
        if POOLED:
            rank = tl.maximum(rank, weight)
        elif SEARCH:
            if P_HEADS:
                p = tl.load(p_ptr + kv_head)
            p = tl.full([], 0.0, tl.float32) + p
            may_list = may_list & (score > float("-inf"))
            threshold = number(row_threshold(score.to(tl.float16), may_list, lse, p, min_keys))
            rank = tl.where(may_list & (score >= threshold), weight, float("-inf"))
        else:
            threshold = number(tl.load(threshold_ptr + row * GROUP + member))
            chosen = may_list & (score >= threshold)
            rank = tl.maximum(rank, tl.where(chosen, weight, float("-inf")))
        scores_ptr += scores_stride_h
    rounded = rank.to(tl.float16)
    rank = rounded.to(tl.float32)
    if POOLED:
        may_list = may_list & (rank > float("-inf"))
        keys = tl.where(may_list, ordered(rounded), -1)
        found = number(halve(keys, tl.full([ROW], 1, tl.int32), 0, min_keys))
        rank = tl.where(may_list & (rank >= found), rank, float("-inf"))
    total = tl.sum((rank > float("-inf")).to(tl.int32), 0)

    # What is above the level is listed, and of those at it all but the ``older`` ones.
    level = tl.full([], float("-inf"), tl.float32)
    older = total
    if total > capacity:
        if NEWEST:
            # More than fit only by ties with the last of them.
            level = tl.min(tl.where(rank > float("-inf"), rank, float("inf")), 0)
            older = total - capacity
        else:
            # The rank of the first that has no room; of those at it none is listed.
            keys = tl.where(rank > float("-inf"), ordered(rounded), -1)
            level = number(halve(keys, tl.full([ROW], 1, tl.int32), 0, capacity + 1))
    kept = rank > level
    if NEWEST:
        tied = (rank == level) & (rank > float("-inf"))
        kept = kept | (tied & (tl.cumsum(tied.to(tl.int32), 0) > older))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    position = positions(page_lists_ptr, column, columns, PAGES)
    tl.store(lists_ptr + row.to(tl.int64) * capacity + place, position, mask=kept & (place < capacity))
    listed = tl.sum(kept.to(tl.int32), 0)
    tl.store(counts_ptr + row, listed)
    tl.store(dropped_ptr + row, total - listed)
