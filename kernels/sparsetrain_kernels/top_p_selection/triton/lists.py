"""The kernel that makes the list of each KV head: which of its candidates are listed, and their places."""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import (
    LARGEST,
    load_scores,
    number,
    positions,
    row_bounds,
    search,
)


@triton.jit
def list_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    floor_ptr,
    threshold_ptr,
    taken_ptr,
    segments_ptr,
    columns_ptr,
    sifted_ptr,
    rank_ptr,
    before_ptr,
    due_ptr,
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
    chunks,
    capacity,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    NEWEST: tl.constexpr,
    DUE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """The positions of the group's union, ascending, int32 ``[B, Hkv, capacity]``, how many they are, and for how many
    there is no room, int32 ``[B, Hkv]``. One program a KV head.

    Candidates lie chunk by chunk, the chunks in any order. So how many are listed before each is counted as they lie,
    and set right by chunk. The rank of a candidate, fp16 ``[B, Hkv, M]``, is the log of the largest weight given by a
    head that chose it; -inf of the others. ``before`` is int32 ``[B, Hkv, NEWEST + 1, M]``: candidates above the level
    of the list up to each one, and those at it.
    """
    row = tl.program_id(0)
    kv_head = row % KV_HEADS
    batch = row // KV_HEADS
    if DUE:  # noqa: SIM102 (known when compiled)
        if tl.load(due_ptr + batch) == 0:
            return
    columns, length, recent_start = row_bounds(
        lengths_ptr, recents_ptr, page_counts_ptr, batch, kv_head, all_columns, recent, KV_HEADS, RECENTS, PAGES
    )
    if PAGES:
        page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
    segments_ptr += row * chunks * 2
    columns_ptr += row.to(tl.int64) * all_columns
    rank_ptr += row.to(tl.int64) * all_columns
    before_ptr += row.to(tl.int64) * all_columns * (NEWEST + 1)
    lists_ptr += row.to(tl.int64) * capacity
    rows = batch * KV_HEADS * GROUP + kv_head * GROUP
    sifted_ptr += rows.to(tl.int64) * all_columns
    scores_ptr += batch.to(tl.int64) * scores_stride_b + (kv_head * GROUP).to(tl.int64) * scores_stride_h
    taken = tl.load(taken_ptr + row)
    chunk = tl.arange(0, CHUNKS_PAD)

    is_short = False
    for member in tl.static_range(GROUP):
        is_short = is_short | (tl.load(threshold_ptr + rows + member) < tl.load(floor_ptr + rows + member))
    if is_short:
        # A guess was wrong: every key is a candidate.
        for start in range(0, columns, GATHER):
            column = start + tl.arange(0, GATHER)
            tl.store(columns_ptr + column, column, mask=column < columns)
            for member in tl.static_range(GROUP):
                own_ptr = scores_ptr + tl.full([], member, tl.int64) * scores_stride_h
                score, listed = load_scores(
                    own_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES
                )
                score = tl.where(listed, score, float("-inf")).to(tl.float16)
                own_ptr = sifted_ptr + tl.full([], member, tl.int64) * all_columns
                tl.store(own_ptr + column, score, mask=column < columns)
        exists = chunk * CHUNK < columns
        tl.store(segments_ptr + chunk * 2, chunk * CHUNK, mask=exists)
        tl.store(segments_ptr + chunk * 2 + 1, tl.minimum(columns - chunk * CHUNK, CHUNK), mask=exists)
        taken = columns
        tl.debug_barrier()

    members = tl.zeros([GATHER], tl.int32)
    for start in range(0, taken, GATHER):
        place = start + tl.arange(0, GATHER)
        rank = tl.full([GATHER], float("-inf"), tl.float32)
        for member in tl.static_range(GROUP):
            own_ptr = sifted_ptr + tl.full([], member, tl.int64) * all_columns
            score = tl.load(own_ptr + place, mask=place < taken, other=float("-inf")).to(tl.float32)
            threshold = number(tl.load(threshold_ptr + rows + member))
            weight = tl.maximum(score - tl.load(lse_ptr + rows + member), -LARGEST)
            is_chosen = (score > float("-inf")) & (score >= threshold)
            rank = tl.maximum(rank, tl.where(is_chosen, weight, float("-inf")))
        tl.store(rank_ptr + place, rank.to(tl.float16), mask=place < taken)
        members += (rank > float("-inf")).to(tl.int32)
    total = tl.sum(members, 0)
    tl.debug_barrier()

    # What is above the level is listed, and of those at it all but the ``older`` ones.
    level = tl.full([], float("-inf"), tl.float32)
    older = total
    if total > capacity:
        if NEWEST:
            # More than fit only by ties with the last of them.
            level = number(tl.load(threshold_ptr + rows))
            older = total - capacity
        else:
            # The rank of the first that has no room; of those at it none is listed.
            level = number(
                search(
                    rank_ptr,
                    rank_ptr,
                    taken,
                    taken,
                    0,
                    taken,
                    0.0,
                    0,
                    capacity + 1,
                    PAGES=False,
                    MASSES=False,
                    TILE=TILE,
                )
            )

    above_so_far = 0
    tied_so_far = 0
    for start in range(0, taken, GATHER):
        place = start + tl.arange(0, GATHER)
        rank = tl.load(rank_ptr + place, mask=place < taken, other=float("-inf")).to(tl.float32)
        above = (rank > level).to(tl.int32)
        tl.store(before_ptr + place, above_so_far + tl.cumsum(above, 0), mask=place < taken)
        above_so_far += tl.sum(above, 0)
        if NEWEST:
            tied = ((rank == level) & (rank > float("-inf"))).to(tl.int32)
            tl.store(before_ptr + all_columns + place, tied_so_far + tl.cumsum(tied, 0), mask=place < taken)
            tied_so_far += tl.sum(tied, 0)
    tl.debug_barrier()

    exists = chunk * CHUNK < columns
    first = tl.load(segments_ptr + chunk * 2, mask=exists, other=0)
    last = first + tl.load(segments_ptr + chunk * 2 + 1, mask=exists, other=0) - 1
    some = last >= first
    until = tl.load(before_ptr + first - 1, mask=some & (first > 0), other=0)
    above = tl.load(before_ptr + last, mask=some, other=0) - until
    tl.debug_barrier()
    # What to add to the count of a candidate, by its chunk.
    tl.store(segments_ptr + chunk * 2, tl.cumsum(above, 0) - above - until, mask=exists)
    if NEWEST:
        until = tl.load(before_ptr + all_columns + first - 1, mask=some & (first > 0), other=0)
        tied = tl.load(before_ptr + all_columns + last, mask=some, other=0) - until
        tl.store(segments_ptr + chunk * 2 + 1, tl.cumsum(tied, 0) - tied - until, mask=exists)
    tl.debug_barrier()

    for start in range(0, taken, GATHER):
        place = start + tl.arange(0, GATHER)
        rank = tl.load(rank_ptr + place, mask=place < taken, other=float("-inf")).to(tl.float32)
        column = tl.load(columns_ptr + place, mask=place < taken, other=0)
        kept = rank > level
        own = column // CHUNK * 2
        # Listed up to this one, itself included.
        listed_until = tl.load(before_ptr + place, mask=place < taken, other=0) + tl.load(segments_ptr + own)
        if NEWEST:
            ties = tl.load(before_ptr + all_columns + place, mask=place < taken, other=0) + tl.load(
                segments_ptr + own + 1
            )
            kept = kept | ((rank == level) & (rank > float("-inf")) & (ties > older))
            listed_until += tl.maximum(ties - older, 0)
        position = positions(page_lists_ptr, column, all_columns, PAGES)
        tl.store(lists_ptr + listed_until - 1, position, mask=kept & (listed_until <= capacity))
    listed = above_so_far + tl.maximum(tied_so_far - older, 0)
    tl.store(counts_ptr + row, listed)
    tl.store(dropped_ptr + row, total - listed)
