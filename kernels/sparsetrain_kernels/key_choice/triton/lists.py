"""The kernel that lists the heaviest keys of each row from the logarithms of their weights.

A row is long and its list is short, so most of the row is never read. The largest weight of every ``SPAN`` keys, its
peak, bounds from below the weight that the list ends with. Only spans whose peak, or a neighbour's, reaches this floor
hold keys for the list. All numbers are those of fp16, and every bound is found by halves among these: no sort.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import number, ordered

SPAN = tl.constexpr(16)
"""Keys of which the largest weight is kept."""
INFINITY = tl.constexpr(float("inf"))


# Sizes are not specialised: a new one is no new compilation.
@triton.jit(do_not_specialize=["part_rows", "first_row", "rows", "capacity", "sinks", "window"])
def top_keys_kernel(
    weights_ptr,
    peaks_ptr,
    lengths_ptr,
    spans_ptr,
    columns_ptr,
    pooled_ptr,
    lists_ptr,
    counts_ptr,
    dropped_ptr,
    part_rows,
    first_row,
    rows,
    weights_stride_n,
    peaks_stride_n,
    capacity,
    sinks,
    window,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of one row, the ``capacity`` keys of the largest weights, pooled over ``HALF`` keys on either side. One program a
    row of ``weights``, fp16 ``[KV heads, part_rows, weights_stride_n]``, of which ``peaks [KV heads, part_rows,
    peaks_stride_n]`` are the largest of every ``SPAN``. Behind ``peaks`` and ``pooled`` there is room for ``TILE``
    numbers that mean nothing.

    ``spans``, int32 like ``peaks``, and ``columns`` and ``pooled``, int32 and fp16 like ``weights``, are for the
    program's own use. Writes int32 ``lists [KV heads, rows, capacity]``, ``counts`` and ``dropped [KV heads, rows]`` at
    the rows from ``first_row`` on.
    """
    line = tl.program_id(0)
    row = first_row + line % part_rows
    place = line // part_rows * rows + row
    lists_ptr += place.to(tl.int64) * capacity
    length = tl.load(lengths_ptr + row)
    # Keys from ``sinks`` to ``end`` may be listed.
    end = length - window
    if end - sinks <= capacity:
        for start in range(sinks, end, TILE):
            column = start + tl.arange(0, TILE)
            tl.store(lists_ptr + column - sinks, column, mask=column < end)
        tl.store(counts_ptr + place, tl.maximum(end - sinks, 0))
        tl.store(dropped_ptr + place, 0)
        return
    weights_ptr += line.to(tl.int64) * weights_stride_n
    columns_ptr += line.to(tl.int64) * weights_stride_n
    pooled_ptr += line.to(tl.int64) * weights_stride_n
    peaks_ptr += line.to(tl.int64) * peaks_stride_n
    spans_ptr += line.to(tl.int64) * peaks_stride_n

    floor = floor_of(peaks_ptr, sinks, end, capacity, HALF, TILE)
    spans = spans_from(floor, peaks_ptr, spans_ptr, sinks, end, length, HALF, TILE)
    tl.debug_barrier()
    taken = keys_from(floor, weights_ptr, spans_ptr, columns_ptr, pooled_ptr, spans, sinks, end, length, HALF, TILE)
    tl.debug_barrier()
    least, enough = kth_largest(pooled_ptr, 0, taken, capacity, TILE)
    # Of those equal to the last one listed, the older ones are left out.
    older = enough - capacity
    above_so_far = 0
    tied_so_far = 0
    for start in range(0, taken, TILE):
        entry = start + tl.arange(0, TILE)
        weight = tl.load(pooled_ptr + entry, mask=entry < taken, other=-INFINITY)
        column = tl.load(columns_ptr + entry, mask=entry < taken, other=0)
        above = weight > least
        tied = weight == least
        above_until = above_so_far + tl.cumsum(above.to(tl.int32), 0)
        tied_until = tied_so_far + tl.cumsum(tied.to(tl.int32), 0)
        kept = above | (tied & (tied_until > older))
        tl.store(lists_ptr + above_until + tl.maximum(tied_until - older, 0) - 1, column, mask=kept)
        above_so_far += tl.sum(above.to(tl.int32), 0)
        tied_so_far += tl.sum(tied.to(tl.int32), 0)
    tl.store(counts_ptr + place, capacity)
    tl.store(dropped_ptr + place, older)


@triton.jit
def floor_of(peaks_ptr, sinks, end, k, HALF: tl.constexpr, TILE: tl.constexpr):
    """A number that at least ``k`` of the pooled weights reach, fp16.

    A peak is the pooled weight of itself and of ``HALF`` keys on either side. Two of three peaks that follow one
    another may be neighbours, but the third is more than a span behind the first. So ``n`` peaks are the pooled weights
    of ``n`` times ``HALF + 1`` keys at least, or of half a span, if that is less. Only peaks count all of whose keys
    may be listed.
    """
    EACH: tl.constexpr = HALF + 1 if HALF < SPAN // 2 else SPAN // 2
    first = tl.cdiv(sinks + HALF, SPAN)
    beyond = (end - HALF) // SPAN
    needed = tl.cdiv(k, EACH)
    floor = tl.full([], -INFINITY, tl.float16)
    if beyond - first >= needed:
        floor, _ = kth_largest(peaks_ptr, first, beyond, needed, TILE)
    return floor


@triton.jit
def kth_largest(numbers_ptr, first, beyond, k, TILE: tl.constexpr):
    """The ``k``-th largest of the fp16 numbers from ``first`` to ``beyond``, which are as many at least, and how many
    reach it. Whole tiles are read, from the one of ``first`` on."""
    origin = first // TILE * TILE
    highest = tl.full([TILE], -INFINITY, tl.float16)
    lowest = tl.full([TILE], INFINITY, tl.float16)
    for start in range(origin, beyond, TILE):
        entry = start + tl.arange(0, TILE)
        own = tl.load(numbers_ptr + entry)
        inside = (entry >= first) & (entry < beyond)
        highest = tl.maximum(highest, tl.where(inside, own, -INFINITY))
        lowest = tl.minimum(lowest, tl.where(inside, own, INFINITY))
    # Found below ``above``, where there is nothing.
    found = ordered(tl.min(lowest, 0))
    above = ordered(tl.max(highest, 0)) + 1
    enough = beyond - first
    while above - found > 1:
        middle = (found + above) // 2
        bound = number(middle).to(tl.float16)
        count = tl.zeros([TILE], tl.int32)
        for start in range(origin, beyond, TILE):
            entry = start + tl.arange(0, TILE)
            own = tl.load(numbers_ptr + entry)
            count += ((own >= bound) & (entry >= first) & (entry < beyond)).to(tl.int32)
        reached = tl.sum(count, 0)
        if reached >= k:
            found = middle
            enough = reached
        else:
            above = middle
    return number(found).to(tl.float16), enough


@triton.jit
def spans_from(floor, peaks_ptr, spans_ptr, sinks, end, length, HALF: tl.constexpr, TILE: tl.constexpr):
    """Writes which spans may hold keys whose pooled weight reaches the floor, ascending, and returns how many."""
    REACH: tl.constexpr = (HALF + SPAN - 1) // SPAN
    count = 0
    for start in range(sinks // SPAN, tl.cdiv(end, SPAN), TILE):
        span = start + tl.arange(0, TILE)
        peak = tl.full([TILE], -INFINITY, tl.float16)
        for step in tl.static_range(-REACH, REACH + 1):
            exists = (span + step >= 0) & ((span + step) * SPAN < length)
            peak = tl.maximum(peak, tl.load(peaks_ptr + span + step, mask=exists, other=-INFINITY))
        some = (peak >= floor) & (span < tl.cdiv(end, SPAN))
        until = count + tl.cumsum(some.to(tl.int32), 0)
        tl.store(spans_ptr + until - 1, span, mask=some)
        count += tl.sum(some.to(tl.int32), 0)
    return count


@triton.jit
def keys_from(
    floor,
    weights_ptr,
    spans_ptr,
    columns_ptr,
    pooled_ptr,
    spans,
    sinks,
    end,
    length,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes which keys of the listed spans have a pooled weight that reaches the floor, ascending, and these weights;
    returns how many."""
    count = 0
    for start in range(0, spans, TILE // SPAN):
        place = start + tl.arange(0, TILE // SPAN)
        span = tl.load(spans_ptr + place, mask=place < spans, other=0)
        column = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        exists = (place < spans)[:, None]
        pooled = tl.full([TILE // SPAN, SPAN], -INFINITY, tl.float16)
        for step in tl.static_range(-HALF, HALF + 1):
            is_key = exists & (column + step >= 0) & (column + step < length)
            pooled = tl.maximum(pooled, tl.load(weights_ptr + column + step, mask=is_key, other=-INFINITY))
        some = exists & (column >= sinks) & (column < end) & (pooled >= floor)
        some = tl.reshape(some.to(tl.int32), [TILE])
        until = count + tl.cumsum(some, 0)
        tl.store(columns_ptr + until - 1, tl.reshape(column, [TILE]), mask=some > 0)
        tl.store(pooled_ptr + until - 1, tl.reshape(pooled, [TILE]), mask=some > 0)
        count += tl.sum(some, 0)
    return count
