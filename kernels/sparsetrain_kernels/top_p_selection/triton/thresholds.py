"""The kernels that find the threshold of each row of scores, and gather the keys that may pass it.

A floor is guessed from a sample of the row (``guess_kernel``). One pass over all scores gathers the keys at or above
the floor of any head of their group, the candidates (``sift_kernel``). The threshold is searched among these alone
(``threshold_kernel``): what all keys weigh together is known, since scores come with their log-sum-exp.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import (
    LARGEST,
    LOG2E,
    ONE,
    amounts,
    held_threshold,
    load_scores,
    mass_of,
    mass_parts,
    masses,
    number,
    ordered,
    positions,
    row_bounds,
    search,
    weights,
)


@triton.jit
def guess_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    due_ptr,
    p_ptr,
    floor_ptr,
    taken_ptr,
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
    DUE: tl.constexpr,
    APART: tl.constexpr,
    SAMPLE: tl.constexpr,
    PIECE: tl.constexpr,
    GUESSES: tl.constexpr,
    TURNS: tl.constexpr,
):
    """A number that the threshold of a row is not below with near certainty, as an integer in the order of fp16's
    numbers, int32 ``[B, rows]``; and zero for the candidates of each KV head, the first of int32 ``[B, Hkv, APART]``.
    One program a row, which tries ``GUESSES`` numbers in each of its ``TURNS``.

    What is estimated is the mass *below* a number, of which each key has little, so that a few keys with nearly all of
    the weight, which a sample misses, do not matter. A wrong guess costs time alone: the threshold is checked against
    it.
    """
    PIECES: tl.constexpr = SAMPLE // PIECE
    GROUP: tl.constexpr = HEADS // KV_HEADS
    batch = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // GROUP
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
    tl.store(taken_ptr + (batch * KV_HEADS + kv_head) * APART, 0, mask=head % GROUP == 0)
    if P_HEADS:
        p = tl.load(p_ptr + head)
    floor = 0
    if (columns > SAMPLE) & (p < 1.0):
        scores_ptr += batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
        if PAGES:
            page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
        lse = tl.load(lse_ptr + tl.program_id(0))
        # Without a share of the weight, as of the k heaviest keys, their number alone decides.
        most = tl.where(p > 0.0, 1.0 - p, float("inf"))
        pieces = columns // PIECE
        index = tl.arange(0, SAMPLE)
        piece = (index // PIECE).to(tl.int64) * pieces // PIECES
        column = piece.to(tl.int32) * PIECE + index % PIECE
        score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
        share = pieces.to(tl.float32) / PIECES
        least = tl.min(tl.where(listed, score, float("inf")), 0)
        # Not below it: all keys of a row that weigh less have no more than what may be left out.
        low = tl.maximum(least, lse + (tl.log2(most) - tl.log2(columns.to(tl.float32))) / LOG2E)
        low = tl.where(p > 0.0, low, least)
        step = tl.maximum(tl.max(tl.where(listed, score, float("-inf")), 0) - low, 0.0)
        weight = tl.where(listed, weights(score, lse), 0.0)[None, :]
        row = tl.where(listed, score, float("inf"))[None, :]
        guess = tl.arange(0, GUESSES)
        found = 1
        for _ in tl.static_range(TURNS):
            step /= GUESSES
            bound = low + step * guess
            mass = tl.sum(tl.where(row < bound[:, None], weight, 0.0), 1)
            # The sample may miss a key of the largest weight below the bound, and none of its own is larger.
            largest = tl.exp2(tl.minimum((bound - lse) * LOG2E, 0.0))
            mass += deviations * tl.sqrt(largest * (mass + largest))
            # Estimates only grow with the bound.
            fits = tl.sum((share * mass <= most).to(tl.int32), 0)
            found = tl.minimum(found, fits)
            low += step * tl.maximum(fits - 1, 0)
        count = tl.sum((listed & (score >= low)).to(tl.int32), 0).to(tl.float32)
        if share * (count - deviations * tl.sqrt(count + 1.0)) < min_keys:
            # Too few keys are above it.
            step = low - least
            low = least
            row = tl.where(listed, score, float("-inf"))[None, :]
            for _ in tl.static_range(TURNS):
                step /= GUESSES
                bound = low + step * guess
                kept = tl.sum((row >= bound[:, None]).to(tl.int32), 1).to(tl.float32)
                kept -= deviations * tl.sqrt(kept + 1.0)
                fits = tl.sum((share * kept >= min_keys).to(tl.int32), 0)
                found = tl.minimum(found, fits)
                low += step * tl.maximum(fits - 1, 0)
        if (found > 0) & (least < float("inf")):
            floor = ordered(low - step)
    tl.store(floor_ptr + tl.program_id(0), floor)


@triton.jit
def sift_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    due_ptr,
    floor_ptr,
    taken_ptr,
    always_ptr,
    segments_ptr,
    columns_ptr,
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
    DUE: tl.constexpr,
    APART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gathers the candidates among a chunk of the rows of a group: their columns, int32 ``[B, Hkv, M]``, ascending
    within a chunk. Chunks come in any order: where those of each start and how many they are, int32
    ``[B, Hkv, chunks, 2]``. And of candidate pages the mass of the chunk's keys that are attended in any case, int64
    ``[B, rows, chunks]``. Grid: chunks fastest, then KV heads, then the batch."""
    chunk = tl.program_id(0) % chunks
    row = tl.program_id(0) // chunks
    kv_head = row % KV_HEADS
    batch = row // KV_HEADS
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
    if chunk * CHUNK < columns:
        if PAGES:
            page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
        rows = row * GROUP
        scores_ptr += batch.to(tl.int64) * scores_stride_b + (kv_head * GROUP).to(tl.int64) * scores_stride_h
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        position = positions(page_lists_ptr, column, columns, PAGES)
        exists = (position >= 0) & (position < length)
        may_list = exists & (position >= sinks) & (position < recent_start)
        some = column < 0
        for member in tl.static_range(GROUP):
            # The mask ends with the tensor, not with the sequence, so that many scores are loaded at a time.
            own_ptr = scores_ptr + tl.full([], member, tl.int64) * scores_stride_h
            score = tl.load(own_ptr + column, mask=column < all_columns, other=float("-inf"))
            # No key has the score -inf.
            floor = tl.maximum(number(tl.load(floor_ptr + rows + member)), -LARGEST).to(tl.float16)
            some = some | (score >= floor)
        some = (some & may_list).to(tl.int32)
        count = tl.sum(some, 0)
        start = 0
        if count > 0:
            start = tl.atomic_add(taken_ptr + row * APART, count, sem="relaxed")
            place = start + tl.cumsum(some, 0) - 1
            tl.store(columns_ptr + row.to(tl.int64) * all_columns + place, column, mask=some > 0)
        tl.store(segments_ptr + tl.program_id(0) * 2, start)
        tl.store(segments_ptr + tl.program_id(0) * 2 + 1, count)

        if PAGES:
            always = exists & (may_list == 0)
            has_always = tl.sum(always.to(tl.int32), 0) > 0
            for member in tl.static_range(GROUP):
                mass = tl.full([], 0, tl.int64)
                if has_always:
                    own_ptr = scores_ptr + tl.full([], member, tl.int64) * scores_stride_h
                    attended = tl.load(own_ptr + column, mask=always, other=float("-inf")).to(tl.float32)
                    mass = tl.sum(masses(attended, tl.load(lse_ptr + rows + member)), 0)
                tl.store(always_ptr + (rows + member).to(tl.int64) * chunks + chunk, mass)


@triton.jit
def find_threshold(
    scores_ptr,
    page_lists_ptr,
    columns,
    length,
    sinks,
    recent_start,
    lse,
    floor,
    least_mass,
    min_keys,
    PAGES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest number from which on keys have the least mass and are the least number; no less than ``floor``."""
    found = tl.full([], 65535, tl.int32)
    if least_mass > 0:
        found = search(
            scores_ptr, page_lists_ptr, columns, length, sinks, recent_start, lse, floor, least_mass, PAGES, True, TILE
        )
    if min_keys > 0:
        _, count = amounts(scores_ptr, page_lists_ptr, columns, length, sinks, recent_start, lse, found, PAGES, TILE)
        if count < min_keys:
            found = search(
                scores_ptr,
                page_lists_ptr,
                columns,
                length,
                sinks,
                recent_start,
                lse,
                floor,
                min_keys,
                PAGES,
                False,
                TILE,
            )
    return found


@triton.jit
def ends_mass(scores_ptr, length, sinks, recent_start, lse, STEP: tl.constexpr):
    """The mass of the first and the last tokens of a row, which are attended in any case."""
    mass = tl.zeros([STEP], tl.int64)
    first = tl.minimum(sinks, length)
    for start in range(0, first, STEP):
        column = start + tl.arange(0, STEP)
        score = tl.load(scores_ptr + column, mask=column < first, other=float("-inf")).to(tl.float32)
        mass += masses(score, lse)
    for start in range(tl.maximum(recent_start, first), length, STEP):
        column = start + tl.arange(0, STEP)
        score = tl.load(scores_ptr + column, mask=column < length, other=float("-inf")).to(tl.float32)
        mass += masses(score, lse)
    return tl.sum(mass, 0)


@triton.jit
def sifted_threshold(
    scores_ptr, columns_ptr, sifted_ptr, taken, lse, floor, least_mass, min_keys, asked, HELD: tl.constexpr
):
    """The threshold of a row among up to ``HELD`` candidates, in registers, and whether it may lie below the floor."""
    place = tl.arange(0, HELD)
    column = tl.load(columns_ptr + place, mask=place < taken, other=0)
    score = tl.load(scores_ptr + column, mask=place < taken, other=float("-inf"))
    tl.store(sifted_ptr + place, score, mask=place < taken)
    found = tl.full([], 0, tl.int32)
    is_below = found > 0
    if asked:
        keys = tl.where(score > float("-inf"), ordered(score), -1)
        large, small, is_sound = mass_parts(score.to(tl.float32), lse)
        found = held_threshold(keys, large, small, is_sound, floor, least_mass, min_keys)
        if (found == floor) & (floor > 0):
            own = keys >= floor
            is_below = (mass_of(own, large, small, is_sound) < least_mass) | (tl.sum(own.to(tl.int32)) < min_keys)
    return found, is_below


@triton.jit
def threshold_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    recents_ptr,
    page_lists_ptr,
    page_counts_ptr,
    due_ptr,
    p_ptr,
    floor_ptr,
    taken_ptr,
    always_ptr,
    columns_ptr,
    sifted_ptr,
    own_ptr,
    threshold_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    recent,
    sinks,
    chunks,
    min_keys,
    p,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    P_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    DUE: tl.constexpr,
    APART: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
    FEW: tl.constexpr,
    SOME: tl.constexpr,
):
    """The threshold of a row, int32 ``[B, rows]``: the least score that stays, as an integer in the order of fp16's
    numbers. And the scores of the candidates, fp16 ``[B, rows, M]``. One program a row. It searches among the
    candidates of the group, in registers where they fit; of more it brings its own together in ``own [B, rows, M]``.
    Where the floor is above the threshold it looks at all of the row."""
    row = tl.program_id(0)
    batch = row // HEADS
    head = row % HEADS
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
    columns_ptr += (batch * KV_HEADS + kv_head).to(tl.int64) * all_columns
    sifted_ptr += row.to(tl.int64) * all_columns
    own_ptr += row.to(tl.int64) * all_columns
    floor = tl.load(floor_ptr + row)
    taken = tl.load(taken_ptr + (batch * KV_HEADS + kv_head) * APART)
    lse = tl.load(lse_ptr + row)
    if P_HEADS:
        p = tl.load(p_ptr + head)
    p = tl.full([], 0.0, tl.float32) + p
    asked = p < 1.0
    least_mass = tl.full([], 0, tl.int64)
    if asked:
        if PAGES:
            index = tl.arange(0, CHUNKS_PAD)
            always = tl.load(always_ptr + row.to(tl.int64) * chunks + index, mask=index * CHUNK < columns, other=0)
            least_mass = tl.ceil(p.to(tl.float64) * ONE).to(tl.int64) - tl.sum(always, 0)
        else:
            always = ends_mass(scores_ptr, columns, sinks, recent_start, lse, 128)
            least_mass = tl.ceil(p.to(tl.float64) * ONE).to(tl.int64) - always

    found = tl.full([], 0, tl.int32)
    is_below = found > 0
    if taken <= FEW:
        found, is_below = sifted_threshold(
            scores_ptr, columns_ptr, sifted_ptr, taken, lse, floor, least_mass, min_keys, asked, FEW
        )
    elif taken <= SOME:
        found, is_below = sifted_threshold(
            scores_ptr, columns_ptr, sifted_ptr, taken, lse, floor, least_mass, min_keys, asked, SOME
        )
    else:
        own = 0
        for start in range(0, taken, GATHER):
            place = start + tl.arange(0, GATHER)
            column = tl.load(columns_ptr + place, mask=place < taken, other=0)
            score = tl.load(scores_ptr + column, mask=place < taken, other=float("-inf"))
            tl.store(sifted_ptr + place, score, mask=place < taken)
            is_own = ((score > float("-inf")) & (ordered(score.to(tl.float32)) >= floor)).to(tl.int32)
            tl.store(own_ptr + own + tl.cumsum(is_own, 0) - 1, score, mask=is_own > 0)
            own += tl.sum(is_own, 0)
        tl.debug_barrier()
        if asked:
            found = find_threshold(
                own_ptr, own_ptr, own, own, 0, own, lse, floor, least_mass, min_keys, PAGES=False, TILE=TILE
            )
            if (found == floor) & (floor > 0):
                mass, count = amounts(own_ptr, own_ptr, own, own, 0, own, lse, floor, PAGES=False, TILE=TILE)
                is_below = (mass < least_mass) | (count < min_keys)
    if is_below:
        if PAGES:
            page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
        found = find_threshold(
            scores_ptr,
            page_lists_ptr,
            columns,
            length,
            sinks,
            recent_start,
            lse,
            0,
            least_mass,
            min_keys,
            PAGES=PAGES,
            TILE=TILE,
        )
    tl.store(threshold_ptr + row, found)
