"""The kernels around the thresholds: weights of a group pooled before them, and lists made with them."""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import LARGEST, load_scores, number, positions, row_bounds, search


@triton.jit
def pool_heads_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    page_lists_ptr,
    page_counts_ptr,
    pooled_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Log of the largest or mean weight that the heads of a group give each key, fp16 ``[B, Hkv, M]``; -inf where there
    is none. Grid: chunks fastest, then KV heads, then the batch."""
    chunk = tl.program_id(0) % chunks
    kv_head = tl.program_id(0) // chunks % KV_HEADS
    batch = tl.program_id(0) // chunks // KV_HEADS
    columns, length, end = row_bounds(
        lengths_ptr, lengths_ptr, page_counts_ptr, batch, kv_head, all_columns, 0, KV_HEADS, False, PAGES
    )
    if PAGES:
        page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        row = scores_ptr + batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
        score, exists = load_scores(row, page_lists_ptr, column, columns, length, 0, end, PAGES)
        lse = tl.load(lse_ptr + batch * KV_HEADS * GROUP + head)
        weight = tl.where(exists, score - lse, float("-inf"))
        peak = tl.maximum(best, weight)
        if MEAN:
            base = tl.where(peak == float("-inf"), 0.0, peak)
            total = total * tl.exp(best - base) + tl.exp(weight - base)
        best = peak
    some = best > float("-inf")
    if MEAN:
        best += tl.log(tl.where(some, total, 1.0) / GROUP)
    best = tl.where(some, tl.maximum(best, -LARGEST), float("-inf"))
    pooled_ptr += (batch.to(tl.int64) * KV_HEADS + kv_head) * all_columns
    tl.store(pooled_ptr + column, best.to(tl.float16), mask=column < all_columns)


@triton.jit
def pool_neighbours_kernel(
    rows_ptr,
    page_lists_ptr,
    pooled_ptr,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    chunks,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest of the ``WIDTH`` scores around each position, of ``[B, Hkv, M]``. Grid as above."""
    chunk = tl.program_id(0) % chunks
    row = tl.program_id(0) // chunks
    if PAGES:
        page_lists_ptr += (row // KV_HEADS).to(tl.int64) * pages_stride_b
        page_lists_ptr += (row % KV_HEADS).to(tl.int64) * pages_stride_h
    rows_ptr += row.to(tl.int64) * all_columns
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    position = positions(page_lists_ptr, column, all_columns, PAGES)
    own = tl.load(rows_ptr + column, mask=column < all_columns, other=float("-inf")).to(tl.float32)
    best = own
    for shift in tl.static_range(-(WIDTH // 2), WIDTH // 2 + 1):
        other = column + shift
        exists = (other >= 0) & (other < all_columns)
        near = tl.load(rows_ptr + other, mask=exists, other=float("-inf")).to(tl.float32)
        # Candidate pages need not follow one another; behind the last one there are no scores.
        place = positions(page_lists_ptr, tl.maximum(other, 0), all_columns, PAGES)
        best = tl.maximum(best, tl.where(place == position + shift, near, float("-inf")))
    best = tl.where(own > float("-inf"), best, float("-inf"))
    tl.store(pooled_ptr + row.to(tl.int64) * all_columns + column, best.to(tl.float16), mask=column < all_columns)


@triton.jit
def rank_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    threshold_ptr,
    rank_ptr,
    counts_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    recent,
    sinks,
    chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The members of a group's union: log of the largest weight given by a head that chose the key, fp16
    ``[B, Hkv, M]``, -inf for the others; and by chunk how many they are, and how many have the weight of the threshold
    where ``GROUP`` is 1, int32 ``[B, Hkv, chunks, 2]``. Grid as above."""
    chunk = tl.program_id(0) % chunks
    kv_head = tl.program_id(0) // chunks % KV_HEADS
    batch = tl.program_id(0) // chunks // KV_HEADS
    columns, length, recent_start = row_bounds(
        lengths_ptr, recents_ptr, page_counts_ptr, batch, kv_head, all_columns, recent, KV_HEADS, RECENTS, PAGES
    )
    if PAGES:
        page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    rank = tl.full([CHUNK], float("-inf"), tl.float32)
    tied = 0
    if chunk * CHUNK < columns:
        for member in tl.static_range(GROUP):
            head = kv_head * GROUP + member
            row = scores_ptr + batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
            score, listed = load_scores(row, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
            lse = tl.load(lse_ptr + batch * KV_HEADS * GROUP + head)
            threshold = tl.load(threshold_ptr + batch * KV_HEADS * GROUP + head)
            weight = tl.maximum(score - lse, -LARGEST)
            rank = tl.maximum(rank, tl.where(listed & (score >= threshold), weight, float("-inf")))
            if GROUP == 1:
                tied = tl.sum((listed & (score == threshold)).to(tl.int32), 0)
    rank_ptr += (batch.to(tl.int64) * KV_HEADS + kv_head) * all_columns
    tl.store(rank_ptr + column, rank.to(tl.float16), mask=column < all_columns)
    tl.store(counts_ptr + tl.program_id(0) * 2, tl.sum((rank > float("-inf")).to(tl.int32), 0))
    tl.store(counts_ptr + tl.program_id(0) * 2 + 1, tied)


@triton.jit
def fit_kernel(
    rank_ptr,
    threshold_ptr,
    counts_ptr,
    level_ptr,
    older_ptr,
    list_counts_ptr,
    dropped_ptr,
    all_columns,
    chunks,
    capacity,
    NEWEST: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """What of a KV head's members is listed: those of a rank above ``level``, and of those at it all but the ``older``
    ones. Where there is room for all, -inf. Brings the counts of the chunks up to date: above the level, and at it.
    One program a KV head."""
    row = tl.program_id(0)
    counts_ptr += row * chunks * 2
    index = tl.arange(0, CHUNKS_PAD)
    members = tl.load(counts_ptr + index * 2, mask=index < chunks, other=0)
    tied = tl.load(counts_ptr + index * 2 + 1, mask=index < chunks, other=0)
    total = tl.sum(members, 0)
    level = tl.full([], float("-inf"), tl.float32)
    older = tl.full([], 0, tl.int32)
    kept = total
    if total > capacity:
        rank_ptr += row.to(tl.int64) * all_columns
        if NEWEST:
            # More than fit only by ties with the last of them.
            level = tl.load(threshold_ptr + row)
            older = total - capacity
            kept = capacity
            tl.store(counts_ptr + index * 2, members - tied, mask=index < chunks)
        else:
            # The rank of the first that has no room; of those at it none is listed.
            level = number(
                search(
                    rank_ptr,
                    rank_ptr,
                    all_columns,
                    all_columns,
                    0,
                    all_columns,
                    0.0,
                    tl.full([], 0, tl.int64),
                    total - capacity - 1,
                    PAGES=False,
                    MASSES=False,
                    TILE=TILE,
                )
            )
            kept = 0
            for chunk in range(chunks):
                column = chunk * CHUNK + tl.arange(0, CHUNK)
                rank = tl.load(rank_ptr + column, mask=column < all_columns, other=float("-inf")).to(tl.float32)
                above = tl.sum((rank > level).to(tl.int32), 0)
                tl.store(counts_ptr + chunk * 2, above)
                tl.store(counts_ptr + chunk * 2 + 1, 0)
                kept += above
            older = total
    else:
        tl.store(counts_ptr + index * 2 + 1, tl.zeros([CHUNKS_PAD], tl.int32), mask=index < chunks)
    tl.store(level_ptr + row, level)
    tl.store(older_ptr + row, older)
    tl.store(list_counts_ptr + row, kept)
    tl.store(dropped_ptr + row, total - kept)


@triton.jit
def write_kernel(
    rank_ptr,
    page_lists_ptr,
    counts_ptr,
    level_ptr,
    older_ptr,
    lists_ptr,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    chunks,
    capacity,
    KV_HEADS: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The positions of a chunk's listed keys, behind those of the chunks before it. Grid as above."""
    chunk = tl.program_id(0) % chunks
    row = tl.program_id(0) // chunks
    index = tl.arange(0, CHUNKS_PAD)
    counts_ptr += row * chunks * 2
    above_all = tl.load(counts_ptr + index * 2, mask=index <= chunk, other=0)
    tied_all = tl.load(counts_ptr + index * 2 + 1, mask=index <= chunk, other=0)
    own = tl.sum(tl.where(index == chunk, above_all + tied_all, 0), 0)
    if own > 0:
        level = tl.load(level_ptr + row)
        older = tl.load(older_ptr + row)
        ties = tl.sum(tl.where(index < chunk, tied_all, 0), 0)
        start = tl.sum(tl.where(index < chunk, above_all, 0), 0) + tl.maximum(ties - older, 0)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        rank = tl.load(
            rank_ptr + row.to(tl.int64) * all_columns + column, mask=column < all_columns, other=float("-inf")
        ).to(tl.float32)
        tied = ((rank == level) & (rank > float("-inf"))).to(tl.int32)
        is_newest = (tied > 0) & (ties + tl.cumsum(tied, 0) > older)
        kept = ((rank > level) | is_newest).to(tl.int32)
        place = start + tl.cumsum(kept, 0) - 1
        if PAGES:
            page_lists_ptr += (row // KV_HEADS).to(tl.int64) * pages_stride_b
            page_lists_ptr += (row % KV_HEADS).to(tl.int64) * pages_stride_h
        position = positions(page_lists_ptr, column, all_columns, PAGES)
        lists_ptr += row.to(tl.int64) * capacity
        tl.store(lists_ptr + place, position, mask=(kept > 0) & (place < capacity))
