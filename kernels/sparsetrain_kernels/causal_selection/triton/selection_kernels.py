"""What comes before and after the search for crossings: scores as integers on an axis, intervals, thresholds.

The arithmetic is that of ``axis.py`` and ``reference.py`` in ``causal_selection``, bit for bit, in a few launches.
Heads (of all sequences) lie one after the other on one line, ``L`` tokens in all; rows, ranks and points of a head
count from its own start where they are stored.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.causal_selection.triton.crossing_kernels import BEYOND_ROWS, NEVER

BITS = tl.constexpr(36)
"""A difference of one between two scores is ``2 ** BITS`` on the axis."""
ROUND = tl.constexpr(6755399441055744.0)
"""``1.5 * 2 ** 52``: what is added to it and taken away again is a whole number, halves to even."""


@triton.jit
def selection_keys_kernel(scores_ptr, doc_start_ptr, key_ptr, line, tokens, BLOCK: tl.constexpr):
    """int64 ``[L]``: a number in the order of the documents and, within them, of the scores of fp32; NaN last."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < line
    score = tl.load(scores_ptr + place, mask=inside, other=0.0)
    # Zeros of both signs are equal, and so are all NaN. Of negative numbers, larger bits mean smaller ones.
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    start = tl.load(doc_start_ptr + place % tokens, mask=inside, other=0)
    tl.store(key_ptr + place, (start.to(tl.int64) << 32) + bits, mask=inside)


@triton.jit
def selection_gaps_kernel(
    sorted_ptr,
    doc_start_ptr,
    gap_ptr,
    arrival_ptr,
    rank_arrival_ptr,
    sums_ptr,
    line,
    tokens,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """int64 ``[L]``: how far a sorted score lies above the one before it, two at most; two at a document's start.

    Also fills what the next kernels only write to in places: ``arrival [L]`` with ``NEVER``, ``rank_arrival [L]`` with
    -1, ``sums [2, L + 1]`` with zeros. The grid reaches the last of them.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < line
    never = tl.full([BLOCK], NEVER, tl.int64)
    tl.store(arrival_ptr + place, never, mask=inside)
    tl.store(rank_arrival_ptr + place, tl.full([BLOCK], -1, tl.int32), mask=inside)
    tl.store(sums_ptr + place, never * 0, mask=place <= line)
    tl.store(sums_ptr + line + 1 + place, never * 0, mask=place <= line)
    rank = place % tokens
    whole, fraction = _parts(tl.load(sorted_ptr + place, mask=inside, other=0.0))
    has_last = inside & (rank > 0)
    last_whole, last_fraction = _parts(tl.load(sorted_ptr + place - 1, mask=has_last, other=0.0))
    first = rank == 0
    if PACKED:
        # Sorting by document first leaves the documents where they were: a rank is a row of the same document.
        first = first | (tl.load(doc_start_ptr + rank, mask=inside, other=0) == rank)
    steps = whole - last_whole
    # Between equal infinities.
    steps = tl.where(steps != steps, 0.0, tl.minimum(tl.maximum(steps, -3.0), 3.0))
    two = tl.full([BLOCK], 2, tl.int64) << BITS
    gap = (steps.to(tl.int64) << BITS) + fraction - last_fraction
    gap = tl.where(first, two, tl.minimum(gap, two))
    tl.store(gap_ptr + place, gap, mask=inside)


@triton.jit
def selection_points_kernel(
    axis_ptr,
    order_ptr,
    doc_start_ptr,
    doc_end_ptr,
    arrival_ptr,
    rank_arrival_ptr,
    rank_entry_ptr,
    point_ptr,
    point_entry_ptr,
    point_key_ptr,
    place_of_points_ptr,
    first_row_ptr,
    better_row_ptr,
    line,
    tokens,
    window,
    sinks,
    steps,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each key, by rank: its two points among those of its head, ascending, in twice the axis' units (the point
    ``u`` one less, just before the key's place); the row at which it arrives, beside each point; the key of each point
    (``rank``, or ``tokens + rank`` for the point ``u - 1``); where its points are, int32 ``[2, L]``; by row, the
    places and the ranks of the keys that arrive; and ``tokens`` as the first row that passes a point or a key, for
    those that are never passed."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < line
    head = place // tokens
    rank = place % tokens
    at = tl.load(axis_ptr + place, mask=inside, other=0)
    token = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int32)
    one = tl.full([BLOCK], 1, tl.int64) << BITS
    # Of points at the same place, those of the kind u come first.
    upper = rank + _count(axis_ptr + head * tokens, at + one, inside, tokens, steps, STRICT=True)
    lower = rank + _count(axis_ptr + head * tokens, at - one, inside, tokens, steps, STRICT=False)
    start = tl.zeros([BLOCK], tl.int32)
    end = tl.zeros([BLOCK], tl.int32) + tokens
    if PACKED:
        start = tl.load(doc_start_ptr + token, mask=inside, other=0)
        end = tl.load(doc_end_ptr + token, mask=inside, other=0)
    competes = (token >= start + sinks) & (token + window < end)
    entry = tl.where(competes, token + window, BEYOND_ROWS)
    points = head.to(tl.int64) * tokens * 2
    tl.store(point_ptr + points + upper, at * 2 - 1, mask=inside)
    tl.store(point_ptr + points + lower, (at - one) * 2, mask=inside)
    tl.store(point_entry_ptr + points + upper, entry, mask=inside)
    tl.store(point_entry_ptr + points + lower, entry, mask=inside)
    tl.store(point_key_ptr + points + upper, rank, mask=inside)
    tl.store(point_key_ptr + points + lower, tokens + rank, mask=inside)
    tl.store(place_of_points_ptr + place, upper, mask=inside)
    tl.store(place_of_points_ptr + line + place, lower, mask=inside)
    tl.store(rank_entry_ptr + place, entry, mask=inside)
    never = tl.zeros([BLOCK], tl.int32) + tokens
    tl.store(first_row_ptr + points + upper, never, mask=inside)
    tl.store(first_row_ptr + points + lower, never, mask=inside)
    tl.store(better_row_ptr + place, never, mask=inside)
    row = head.to(tl.int64) * tokens + entry
    tl.store(arrival_ptr + row, at * 2, mask=inside & competes)
    tl.store(rank_arrival_ptr + row, rank, mask=inside & competes)


@triton.jit
def selection_intervals_kernel(
    axis_ptr,
    order_ptr,
    doc_start_ptr,
    doc_end_ptr,
    first_row_ptr,
    better_row_ptr,
    place_of_points_ptr,
    exit_ptr,
    interior_start_ptr,
    interior_end_ptr,
    counts_ptr,
    mass_ptr,
    line,
    tokens,
    window,
    sinks,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The three rows of each key, int32 by token; and where rows gain and lose keys, int64 ``[L + 1]``: in ``counts``
    the interior ones, and the saturated ones ``2 ** 32`` higher, and in ``mass`` the places of the interior ones.

    Sums of integers do not depend on the order in which atomics add them.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < line
    head = place // tokens
    at = tl.load(axis_ptr + place, mask=inside, other=0)
    token = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int32)
    start = tl.zeros([BLOCK], tl.int32)
    end = tl.zeros([BLOCK], tl.int32) + tokens
    if PACKED:
        start = tl.load(doc_start_ptr + token, mask=inside, other=0)
        end = tl.load(doc_end_ptr + token, mask=inside, other=0)
    entry = tl.where(token < start + sinks, end, tl.minimum(token + window, end))
    points = head.to(tl.int64) * tokens * 2
    upper = tl.load(place_of_points_ptr + place, mask=inside, other=0)
    lower = tl.load(place_of_points_ptr + line + place, mask=inside, other=0)
    exit = tl.load(better_row_ptr + place, mask=inside, other=0)
    first = tl.load(first_row_ptr + points + lower, mask=inside, other=0)
    last = tl.load(first_row_ptr + points + upper, mask=inside, other=0)
    exit = tl.maximum(tl.minimum(exit, end), entry)
    first = tl.maximum(tl.minimum(first, end), entry)
    last = tl.maximum(tl.minimum(last, end), entry)
    row = head.to(tl.int64) * tokens
    tl.store(exit_ptr + row + token, exit, mask=inside)
    tl.store(interior_start_ptr + row + token, first, mask=inside)
    tl.store(interior_end_ptr + row + token, last, mask=inside)
    interior = inside & (last > first)
    saturated = inside & (first > entry)
    one = tl.full([BLOCK], 1, tl.int64)
    tl.atomic_add(counts_ptr + row + first, one, mask=interior)
    tl.atomic_add(counts_ptr + row + last, -one, mask=interior)
    tl.atomic_add(counts_ptr + row + entry, one << 32, mask=saturated)
    tl.atomic_add(counts_ptr + row + first, -(one << 32), mask=saturated)
    tl.atomic_add(mass_ptr + row + first, at, mask=interior)
    tl.atomic_add(mass_ptr + row + last, -at, mask=interior)


@triton.jit
def selection_thresholds_kernel(
    sorted_ptr,
    axis_ptr,
    doc_start_ptr,
    first_row_ptr,
    point_key_ptr,
    counts_ptr,
    mass_ptr,
    threshold_ptr,
    interior_size_ptr,
    saturated_size_ptr,
    line,
    tokens,
    window,
    sinks,
    topk,
    steps,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold of each row and the sizes of its interior and of its saturated set; ``counts`` and ``mass`` are the
    running sums of what :func:`selection_intervals_kernel` left."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < line
    head = place // tokens
    row = place % tokens
    counts = tl.load(counts_ptr + place, mask=inside, other=0)
    interior = counts & 0xFFFFFFFF
    saturated = counts >> 32
    mass = tl.load(mass_ptr + place, mask=inside, other=0) + ((saturated - topk) << BITS)
    points = head.to(tl.int64) * tokens * 2
    # The highest point that the row has passed: its threshold where no key is inside, else less than one below it.
    last = _count(first_row_ptr + points, row, inside, tokens * 2, steps, STRICT=False)
    key = tl.load(point_key_ptr + points + tl.maximum(last - 1, 0), mask=inside, other=0)
    lower = key >= tokens
    key = head.to(tl.int64) * tokens + tl.where(lower, key - tokens, key)
    whole, fraction = _parts(tl.load(sorted_ptr + key, mask=inside, other=0.0))
    one = tl.full([BLOCK], 1, tl.int64) << BITS
    base = tl.load(axis_ptr + key, mask=inside, other=0) - tl.where(lower, one, 0) - fraction
    above = mass - interior * base
    divisor = tl.maximum(interior, 1)
    quotient = above // divisor
    quotient -= (above - quotient * divisor < 0).to(tl.int64)
    above = tl.where(interior > 0, quotient, fraction)
    carry = above >> BITS
    threshold = whole + (carry - lower.to(tl.int64)).to(tl.float64)
    threshold += (above - (carry << BITS)).to(tl.float64) * (1.0 / 68719476736.0)
    start = tl.zeros([BLOCK], tl.int32)
    if PACKED:
        start = tl.load(doc_start_ptr + row, mask=inside, other=0)
    candidates = row - (window - 1) - start - sinks
    threshold = tl.where(candidates > topk, threshold, float("-inf"))
    tl.store(threshold_ptr + place, threshold.to(threshold_ptr.dtype.element_ty), mask=inside)
    tl.store(interior_size_ptr + place, interior.to(tl.int32), mask=inside)
    tl.store(saturated_size_ptr + place, saturated.to(tl.int32), mask=inside)


@triton.jit
def _parts(score):
    """The largest whole number that is not above a score, fp64, and the rest on the axis. NaN counts as infinite."""
    exact = score.to(tl.float64)
    exact = tl.where(exact != exact, float("inf"), exact)
    whole = tl.floor(exact)
    rest = exact - whole
    rest = tl.where(rest != rest, 0.0, rest)
    return whole, ((rest * 68719476736.0 + ROUND) - ROUND).to(tl.int64)


@triton.jit
def _count(sorted_ptr, value, inside, length, steps, STRICT: tl.constexpr):
    """How many of ``length`` ascending numbers are at most ``value``, or below it. ``2 ** steps > length``."""
    low = tl.zeros_like(value).to(tl.int32)
    high = low + length
    for _ in range(0, steps):
        middle = (low + high) // 2
        other = tl.load(sorted_ptr + middle, mask=inside & (low < high), other=0)
        goes_on = (other < value) & (low < high) if STRICT else (other <= value) & (low < high)
        low = tl.where(goes_on, middle + 1, low)
        high = tl.where(goes_on, high, middle)
    return low
