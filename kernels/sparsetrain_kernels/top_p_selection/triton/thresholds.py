"""The kernels that find the threshold of each row of scores."""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import (
    LOG2E,
    load_scores,
    masses,
    number,
    ordered,
    row_bounds,
    search,
)

TOTAL = tl.constexpr(0)
"""Among a row's sums: the mass of all its keys; of those that may be listed the mass and the number below the bracket,
the number inside it and the number of all."""
MASS_BELOW = tl.constexpr(1)
BELOW = tl.constexpr(2)
INSIDE = tl.constexpr(3)
LISTED = tl.constexpr(4)
SUMS = tl.constexpr(8)


@triton.jit
def bracket_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    p_ptr,
    bracket_ptr,
    sums_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    recent,
    sinks,
    min_keys,
    p,
    deviations,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    P_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    SAMPLE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Two numbers between which the threshold of a row lies with near certainty, fp32 ``[B, rows, 2]``, the upper one
    excluded, from a sample of its scores; and zeros for its sums. One program a row.

    What is estimated is the mass *below* a number, of which each key has little, so that a few keys with nearly all of
    the weight, which a sample misses, do not matter. A row of no more keys than the sample has gets infinities. A
    wrong guess costs time alone: the threshold is checked against it.
    """
    PIECES: tl.constexpr = SAMPLE // PIECE
    batch = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    columns, length, recent_start = row_bounds(
        lengths_ptr, recents_ptr, page_counts_ptr, batch, kv_head, all_columns, recent, KV_HEADS, RECENTS, PAGES
    )
    tl.store(sums_ptr + tl.program_id(0) * SUMS + tl.arange(0, SUMS), tl.zeros([SUMS], tl.int64))
    place = bracket_ptr + tl.program_id(0) * 2
    if columns <= SAMPLE:
        tl.store(place, float("-inf"))
        tl.store(place + 1, float("inf"))
    else:
        scores_ptr += batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
        if PAGES:
            page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
        lse = tl.load(lse_ptr + tl.program_id(0))
        if P_HEADS:
            p = tl.load(p_ptr + head)
        pieces = columns // PIECE
        index = tl.arange(0, SAMPLE)
        piece = (index // PIECE).to(tl.int64) * pieces // PIECES
        column = piece.to(tl.int32) * PIECE + index % PIECE
        score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
        weight = tl.where(listed, tl.exp2((score - lse) * LOG2E), 0.0)
        key = tl.where(listed, ordered(score), 65536)
        share = pieces.to(tl.float32) / PIECES
        listed_count = tl.sum(listed.to(tl.int32), 0)
        low = 0
        high = 0
        # Estimates that only grow with the bound, as a search needs.
        low = 0
        for digit in range(16):
            bound = low + (1 << (15 - digit))
            below = key < bound
            mass = tl.sum(tl.where(below, weight, 0.0), 0)
            kept = (listed_count - tl.sum(below.to(tl.int32), 0)).to(tl.float32)
            # The sample may miss a key of the largest weight below the bound.
            largest = tl.exp2(tl.minimum((number(bound) - lse) * LOG2E, 0.0))
            mass += deviations * tl.sqrt(largest * (mass + largest))
            kept -= deviations * tl.sqrt(kept + 1.0)
            low = tl.where((share * mass <= 1.0 - p) & (share * kept >= min_keys), bound, low)
        high = 0
        # Of heavy keys a part is counted, lest the few in the sample make the estimate uncertain far below them.
        weight = tl.minimum(weight, 4.0 * tl.exp2(tl.minimum((number(low) - lse) * LOG2E, 0.0)))
        for digit in range(16):
            bound = high + (1 << (15 - digit))
            below = key < bound
            mass = tl.sum(tl.where(below, weight, 0.0), 0)
            kept = (listed_count - tl.sum(below.to(tl.int32), 0)).to(tl.float32)
            mass -= deviations * tl.sqrt(tl.sum(tl.where(below, weight * weight, 0.0), 0))
            kept += deviations * tl.sqrt(kept + 1.0)
            high = tl.where((share * mass <= 1.0 - p) & (share * kept >= min_keys), bound, high)
        tl.store(place, number(low))
        tl.store(place + 1, tl.where(high >= 64511, float("inf"), number(high + 1)))


@triton.jit
def partition_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    bracket_ptr,
    sums_ptr,
    inside_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    recent,
    sinks,
    chunks,
    room,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds a chunk of a row to its sums, and its scores inside the bracket to ``inside [B, rows, room]``, in any order:
    all that is asked of them are sums of integers. Grid: chunks fastest, then rows."""
    chunk = tl.program_id(0) % chunks
    row = tl.program_id(0) // chunks
    batch = row // HEADS
    head = row % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    columns, length, recent_start = row_bounds(
        lengths_ptr, recents_ptr, page_counts_ptr, batch, kv_head, all_columns, recent, KV_HEADS, RECENTS, PAGES
    )
    if chunk * CHUNK < columns:
        scores_ptr += batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
        if PAGES:
            page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
        lse = tl.load(lse_ptr + row)
        low = tl.load(bracket_ptr + row * 2)
        high = tl.load(bracket_ptr + row * 2 + 1)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
        mass = masses(score, lse)
        below = listed & (score < low)
        inside = (listed & (score >= low) & (score < high)).to(tl.int32)
        found = tl.sum(inside, 0)
        sums_ptr += row * SUMS
        tl.atomic_add(sums_ptr + TOTAL, tl.sum(mass, 0), sem="relaxed")
        tl.atomic_add(sums_ptr + MASS_BELOW, tl.sum(tl.where(below, mass, 0), 0), sem="relaxed")
        tl.atomic_add(sums_ptr + BELOW, tl.sum(below.to(tl.int32), 0).to(tl.int64), sem="relaxed")
        tl.atomic_add(sums_ptr + LISTED, tl.sum(listed.to(tl.int32), 0).to(tl.int64), sem="relaxed")
        if found > 0:
            start = tl.atomic_add(sums_ptr + INSIDE, found.to(tl.int64), sem="relaxed")
            place = start.to(tl.int32) + tl.cumsum(inside, 0) - 1
            inside_ptr += row.to(tl.int64) * room
            tl.store(inside_ptr + place, score.to(tl.float16), mask=(inside > 0) & (place < room))


@triton.jit
def threshold_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    p_ptr,
    bracket_ptr,
    sums_ptr,
    inside_ptr,
    threshold_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    recent,
    sinks,
    min_keys,
    room,
    p,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    P_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    BRACKET: tl.constexpr,
    TILE: tl.constexpr,
):
    """The threshold of a row, fp32 ``[B, rows]``: the least score that stays; infinity where none does. One program a
    row. It looks at the scores inside the bracket, or, without one or where it is wrong, at all of the row."""
    row = tl.program_id(0)
    batch = row // HEADS
    head = row % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    columns, length, recent_start = row_bounds(
        lengths_ptr, recents_ptr, page_counts_ptr, batch, kv_head, all_columns, recent, KV_HEADS, RECENTS, PAGES
    )
    scores_ptr += batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
    if PAGES:
        page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
    lse = tl.load(lse_ptr + row)
    if P_HEADS:
        p = tl.load(p_ptr + head)
    found = tl.full([], -1, tl.int32)
    if BRACKET:
        sums_ptr += row * SUMS
        total = tl.load(sums_ptr + TOTAL)
        listed_count = tl.load(sums_ptr + LISTED).to(tl.int32)
    else:
        total_mass = tl.zeros([TILE], tl.int64)
        total_count = tl.zeros([TILE], tl.int32)
        for start in range(0, columns, TILE):
            column = start + tl.arange(0, TILE)
            score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
            total_mass += masses(score, lse)
            total_count += listed.to(tl.int32)
        total = tl.sum(total_mass, 0)
        listed_count = tl.sum(total_count, 0)
    p = tl.full([], 0.0, tl.float32) + p
    budget = ((1.0 - p.to(tl.float64)) * total.to(tl.float64)).to(tl.int64)
    budget = tl.where(p >= 1.0, -1, budget)
    spare = tl.maximum(listed_count - min_keys, 0)
    if budget < 0:
        found = tl.full([], 0, tl.int32)
    elif BRACKET:
        low = tl.load(bracket_ptr + row * 2)
        high = tl.load(bracket_ptr + row * 2 + 1)
        inside = tl.load(sums_ptr + INSIDE).to(tl.int32)
        # What is left when all below the bracket is dropped.
        budget_inside = budget - tl.load(sums_ptr + MASS_BELOW)
        spare_inside = spare - tl.load(sums_ptr + BELOW).to(tl.int32)
        is_above = (budget_inside >= 0) & (spare_inside >= 0)
        if is_above & (ordered(high) == ordered(low) + 1):
            # Equal scores, which may be the whole row.
            mass_inside = inside.to(tl.int64) * masses(low, lse)
            if (mass_inside > budget_inside) | (inside > spare_inside):
                found = ordered(low)
        elif is_above & (inside <= room):
            inner = search(
                inside_ptr + row.to(tl.int64) * room,
                inside_ptr,
                inside,
                inside,
                0,
                inside,
                lse,
                budget_inside,
                spare_inside,
                PAGES=False,
                MASSES=True,
                TILE=TILE,
            )
            # Past the bracket if all inside it may be dropped, unless nothing lies beyond.
            if (number(inner) < high) | (high == float("inf")):
                found = inner
    if found < 0:
        found = search(
            scores_ptr,
            page_lists_ptr,
            columns,
            length,
            sinks,
            recent_start,
            lse,
            budget,
            spare,
            PAGES=PAGES,
            MASSES=True,
            TILE=TILE,
        )
    tl.store(threshold_ptr + row, number(found))
