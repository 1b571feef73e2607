"""The kernel that makes the list of each KV head: which of its candidates are listed, and their places."""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import (
    LARGEST,
    halve,
    load_scores,
    number,
    ordered,
    positions,
    row_bounds,
    search,
)


@triton.jit
def group_rank(place, taken, sifted_ptr, threshold_ptr, lse_ptr, all_columns, GROUP: tl.constexpr):
    """The log of the largest weight of candidates given by a head that chose it, rounded to fp16; -inf of others. The
    pointers are those of the first head."""
    rank = tl.full(place.shape, float("-inf"), tl.float32)
    for member in tl.static_range(GROUP):
        own_ptr = sifted_ptr + tl.full([], member, tl.int64) * all_columns
        score = tl.load(own_ptr + place, mask=place < taken, other=float("-inf")).to(tl.float32)
        threshold = number(tl.load(threshold_ptr + member))
        weight = tl.maximum(score - tl.load(lse_ptr + member), -LARGEST)
        is_chosen = (score > float("-inf")) & (score >= threshold)
        rank = tl.maximum(rank, tl.where(is_chosen, weight, float("-inf")))
    return rank.to(tl.float16)


@triton.jit
def among_chunks(kept, first, count, own):
    """How many of ``kept`` come before each and itself, in the order of columns: candidates lie chunk by chunk, the
    chunks in any order. ``first`` and ``count`` say where those of each chunk lie, ``own`` is the chunk of each."""
    until = tl.cumsum(kept, 0)
    before = tl.where(first > 0, tl.gather(until, tl.maximum(first - 1, 0), 0), 0)
    within = tl.where(count > 0, tl.gather(until, tl.maximum(first + count - 1, 0), 0) - before, 0)
    return until + tl.gather(tl.cumsum(within, 0) - within - before, own, 0)


@triton.jit
def held_list(
    row,
    lse_ptr,
    page_lists_ptr,
    threshold_ptr,
    segments_ptr,
    columns_ptr,
    sifted_ptr,
    lists_ptr,
    counts_ptr,
    dropped_ptr,
    taken,
    columns,
    all_columns,
    capacity,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    NEWEST: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    HELD: tl.constexpr,
):
    """The list of up to ``HELD`` candidates, which stay in registers."""
    place = tl.arange(0, HELD)
    column = tl.load(columns_ptr + place, mask=place < taken, other=0)
    chunk = tl.arange(0, CHUNKS_PAD)
    exists = chunk * CHUNK < columns
    first = tl.load(segments_ptr + chunk * 2, mask=exists, other=0)
    count = tl.load(segments_ptr + chunk * 2 + 1, mask=exists, other=0)
    rank = group_rank(place, taken, sifted_ptr, threshold_ptr, lse_ptr, all_columns, GROUP).to(tl.float32)
    is_member = rank > float("-inf")
    total = tl.sum(is_member.to(tl.int32), 0)
    level = tl.full([], float("-inf"), tl.float32)
    older = total
    if total > capacity:
        if NEWEST:
            level = number(tl.load(threshold_ptr))
            older = total - capacity
        else:
            keys = tl.where(is_member, ordered(rank), -1)
            level = number(halve(keys, tl.full([HELD], 1, tl.int32), 0, capacity + 1))
    kept = rank > level
    if NEWEST:
        tied = is_member & (rank == level)
        kept = kept | (tied & (among_chunks(tied.to(tl.int32), first, count, column // CHUNK) > older))
    listed_until = among_chunks(kept.to(tl.int32), first, count, column // CHUNK)
    position = positions(page_lists_ptr, column, all_columns, PAGES)
    tl.store(lists_ptr + listed_until - 1, position, mask=kept & (listed_until <= capacity))
    listed = tl.sum(kept.to(tl.int32), 0)
    tl.store(counts_ptr + row, listed)
    tl.store(dropped_ptr + row, total - listed)


@triton.jit
def spread_list(
    row,
    scores_ptr,
    lse_ptr,
    page_lists_ptr,
    threshold_ptr,
    segments_ptr,
    columns_ptr,
    sifted_ptr,
    rank_ptr,
    before_ptr,
    lists_ptr,
    counts_ptr,
    dropped_ptr,
    is_short,
    taken,
    columns,
    length,
    sinks,
    recent_start,
    scores_stride_h,
    all_columns,
    capacity,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    NEWEST: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """The list of more candidates than fit in registers, or with ``is_short`` of all keys, because a guess was wrong.

    How many are listed before each is counted as they lie, and set right by chunk. The rank of a candidate, fp16 ``[B,
    Hkv, M]``, is that of ``group_rank``. ``before`` is int32 ``[B, Hkv, NEWEST + 1, M]``: candidates above the level of
    the list up to each one, and those at it.
    """
    chunk = tl.arange(0, CHUNKS_PAD)
    if is_short:
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
        rank = group_rank(place, taken, sifted_ptr, threshold_ptr, lse_ptr, all_columns, GROUP)
        tl.store(rank_ptr + place, rank, mask=place < taken)
        members += (rank > float("-inf")).to(tl.int32)
    total = tl.sum(members, 0)
    tl.debug_barrier()

    # What is above the level is listed, and of those at it all but the ``older`` ones.
    level = tl.full([], float("-inf"), tl.float32)
    older = total
    if total > capacity:
        if NEWEST:
            # More than fit only by ties with the last of them.
            level = number(tl.load(threshold_ptr))
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


@triton.jit
def list_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    due_ptr,
    floor_ptr,
    threshold_ptr,
    taken_ptr,
    segments_ptr,
    columns_ptr,
    sifted_ptr,
    rank_ptr,
    before_ptr,
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
    DUE: tl.constexpr,
    NEWEST: tl.constexpr,
    APART: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
    FEW: tl.constexpr,
    SOME: tl.constexpr,
):
    """The positions of the group's union, ascending, int32 ``[B, Hkv, capacity]``, how many they are, and for how many
    there is no room, int32 ``[B, Hkv]``. One program a KV head."""
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
    segments_ptr += row * chunks * 2
    columns_ptr += row.to(tl.int64) * all_columns
    rank_ptr += row.to(tl.int64) * all_columns
    before_ptr += row.to(tl.int64) * all_columns * (NEWEST + 1)
    lists_ptr += row.to(tl.int64) * capacity
    rows = batch * KV_HEADS * GROUP + kv_head * GROUP
    sifted_ptr += rows.to(tl.int64) * all_columns
    scores_ptr += batch.to(tl.int64) * scores_stride_b + (kv_head * GROUP).to(tl.int64) * scores_stride_h
    taken = tl.load(taken_ptr + row * APART)
    threshold_ptr += rows
    lse_ptr += rows
    is_short = False
    for member in tl.static_range(GROUP):
        is_short = is_short | (tl.load(threshold_ptr + member) < tl.load(floor_ptr + rows + member))
    held = tl.where(is_short, SOME + 1, taken)
    if held <= FEW:
        held_list(
            row,
            lse_ptr,
            page_lists_ptr,
            threshold_ptr,
            segments_ptr,
            columns_ptr,
            sifted_ptr,
            lists_ptr,
            counts_ptr,
            dropped_ptr,
            taken,
            columns,
            all_columns,
            capacity,
            GROUP,
            PAGES,
            NEWEST,
            CHUNK,
            CHUNKS_PAD,
            FEW,
        )
    elif held <= SOME:
        held_list(
            row,
            lse_ptr,
            page_lists_ptr,
            threshold_ptr,
            segments_ptr,
            columns_ptr,
            sifted_ptr,
            lists_ptr,
            counts_ptr,
            dropped_ptr,
            taken,
            columns,
            all_columns,
            capacity,
            GROUP,
            PAGES,
            NEWEST,
            CHUNK,
            CHUNKS_PAD,
            SOME,
        )
    else:
        spread_list(
            row,
            scores_ptr,
            lse_ptr,
            page_lists_ptr,
            threshold_ptr,
            segments_ptr,
            columns_ptr,
            sifted_ptr,
            rank_ptr,
            before_ptr,
            lists_ptr,
            counts_ptr,
            dropped_ptr,
            is_short,
            taken,
            columns,
            length,
            sinks,
            recent_start,
            scores_stride_h,
            all_columns,
            capacity,
            GROUP,
            PAGES,
            NEWEST,
            CHUNK,
            CHUNKS_PAD,
            GATHER,
            TILE,
        )
