"""What all kernels of a selection know of a row of scores: positions, masses, and the search for a threshold."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(65504.0)
"""Of fp16's numbers."""
PAGE = tl.constexpr(16)
ONE = tl.constexpr(1099511627776.0)
"""The mass of a key that has all of the weight."""
LARGE = tl.constexpr(16777216.0)
"""The same in units of 2^-24."""
SMALL = tl.constexpr(65536.0)
"""And one of them in units of 2^-40."""


@triton.jit
def row_bounds(
    lengths_ptr,
    recents_ptr,
    page_counts_ptr,
    due_ptr,
    batch,
    kv_head,
    columns,
    recent,
    KV_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
    DUE: tl.constexpr,
):
    """Columns of a row behind which there is no key, the tokens of its sequence, and the first of the recent ones. A
    sequence that is not due has no tokens: then there is nothing to do, in any kernel."""
    length = tl.load(lengths_ptr + batch)
    if DUE:
        length = tl.where(tl.load(due_ptr + batch) != 0, length, 0)
    if RECENTS:
        recent = tl.load(recents_ptr + batch)
    if PAGES:
        columns = tl.minimum(tl.load(page_counts_ptr + batch * KV_HEADS + kv_head) * PAGE, columns)
        columns = tl.where(length > 0, columns, 0)
    else:
        columns = tl.minimum(length, columns)
    return columns, length, length - recent


@triton.jit
def positions(page_lists_ptr, column, columns, PAGES: tl.constexpr):
    """The token of each column; below 0 behind the last one."""
    if PAGES:
        page = tl.load(page_lists_ptr + column // PAGE, mask=column < columns, other=-1)
        return page * PAGE + column % PAGE
    else:
        return tl.where(column < columns, column, -1)


@triton.jit
def load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES: tl.constexpr):
    """Scores in fp32, -inf where there is no key, and whether each is of a key that may be listed."""
    position = positions(page_lists_ptr, column, columns, PAGES)
    score = tl.load(scores_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
    score = tl.where((position >= 0) & (position < length), score, float("-inf"))
    listed = (score > float("-inf")) & (position >= sinks) & (position < recent_start)
    return score, listed


@triton.jit
def weights(score, lse):
    """The weight of each score, fp32; 0 of -inf."""
    return tl.where(score > float("-inf"), tl.minimum(tl.exp2((score - lse) * LOG2E), 1.0), 0.0)


@triton.jit
def masses(score, lse):
    """The weight of each score in units of 2^-40, rounded down. A function of the two numbers alone."""
    return (weights(score, lse) * ONE).to(tl.int64)


@triton.jit
def ordered(score):
    """int32 0 to 65,535 in the order of fp16's numbers, equal for equal ones; ``score`` is fp16, or fp32 of such."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (bits ^ ((bits >> 15) & 0x7FFF)) + 32768


@triton.jit
def number(key):
    """The number of such an integer, fp32; an infinity beyond those."""
    key = tl.minimum(tl.maximum(key, 1023), 64512)
    bits = key - 32768
    bits = bits ^ ((bits >> 15) & 0x7FFF)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def mass_parts(score, lse):
    """The mass of each key as two integers, ``2^16`` times the first and the second: sums of 64 bits are slow. And
    whether sums of 32 bits do not overflow: weights of a row sum to 1, if its log-sum-exp is its own."""
    weight = weights(score, lse)
    large = (weight * LARGE).to(tl.int32)
    small = ((weight * LARGE - large.to(tl.float32)) * SMALL).to(tl.int32)
    return large, small, tl.sum(weight) < 4.0


@triton.jit
def mass_of(chosen, large, small, is_sound):
    """The mass of some keys of a row."""
    if is_sound:
        mass = tl.sum(tl.where(chosen, large, 0)).to(tl.int64) * (1 << 16) + tl.sum(tl.where(chosen, small, 0))
    else:
        mass = tl.sum(tl.where(chosen, large.to(tl.int64) * (1 << 16) + small, 0))
    return mass


@triton.jit
def halve(keys, amounts, found, least):
    """The largest number from which on ``keys`` have at least ``least`` of their ``amounts``, all of them in registers;
    no less than ``found``, of which that is taken for granted. Keys are fp16's numbers as integers in their order, -1
    where there is none that may be listed, and ``least`` is above 0."""
    found += tl.full([], 0, tl.int32)
    # Found below ``beyond``, where there is nothing.
    beyond = tl.max(keys) + 1
    while beyond - found > 1:
        middle = (found + beyond) // 2
        if tl.sum(tl.where(keys >= middle, amounts, 0)) >= least:
            found = middle
        else:
            beyond = middle
    return found


@triton.jit
def held_threshold(keys, large, small, is_sound, floor, least_mass, min_keys):
    """A number from which on keys in registers have the least mass and are the least number, and no smaller set of them
    does; no less than ``floor``, of which that is taken for granted.

    The larger parts of masses are searched first: from the number found on their sum is enough, from the next key on it
    is not. That key's smaller parts decide whether there is more to search.
    """
    found = tl.full([], 65535, tl.int32)
    if least_mass > 0:
        found = floor + tl.full([], 0, tl.int32)
        beyond = found
        if is_sound:
            found = halve(keys, large, floor, ((least_mass + ((1 << 16) - 1)) >> 16).to(tl.int32))
            beyond = tl.min(tl.where(keys > found, keys, 65536))
        # Of nothing the mass is 0, which is less than any.
        if mass_of(keys >= beyond, large, small, is_sound) >= least_mass:
            found = halve(keys, large.to(tl.int64) * (1 << 16) + small, beyond, least_mass)
    if tl.sum((keys >= found).to(tl.int32)) < min_keys:
        found = halve(keys, tl.full(keys.shape, 1, tl.int32), floor, min_keys)
    return found


@triton.jit
def amounts(
    scores_ptr,
    page_lists_ptr,
    columns,
    length,
    sinks,
    recent_start,
    lse,
    bound,
    PAGES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The mass and the number of the keys of a row that may be listed, from a number on, in the order of fp16's."""
    mass = tl.zeros([TILE], tl.int64)
    count = tl.zeros([TILE], tl.int32)
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
        listed = listed & (ordered(score) >= bound)
        mass += tl.where(listed, masses(score, lse), 0)
        count += listed.to(tl.int32)
    return tl.sum(mass, 0), tl.sum(count, 0)


@triton.jit
def search(
    scores_ptr,
    page_lists_ptr,
    columns,
    length,
    sinks,
    recent_start,
    lse,
    floor,
    least,
    PAGES: tl.constexpr,
    MASSES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest of fp16's numbers, as an integer in their order, from which on the keys that may be listed have at
    least the mass ``least``, which is above 0, or are as many; no less than ``floor``, of which that is taken for
    granted. By halves; the first tile of the row stays in registers."""
    column = tl.arange(0, TILE)
    score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
    first = tl.where(listed, ordered(score), -1)
    first_amount = masses(score, lse) if MASSES else tl.full([TILE], 1, tl.int32)
    highest = first
    for start in range(TILE, columns, TILE):
        column = start + tl.arange(0, TILE)
        score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
        highest = tl.maximum(highest, tl.where(listed, ordered(score), -1))
    # Found below ``beyond``, where there is nothing.
    beyond = tl.max(highest, 0) + 1
    found = floor + tl.full([], 0, tl.int32)
    while beyond - found > 1:
        middle = (found + beyond) // 2
        amount = tl.where(first >= middle, first_amount, 0)
        for start in range(TILE, columns, TILE):
            column = start + tl.arange(0, TILE)
            score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
            own = masses(score, lse) if MASSES else tl.full([TILE], 1, tl.int32)
            amount += tl.where(listed & (ordered(score) >= middle), own, 0)
        if tl.sum(amount, 0) >= least:
            found = middle
        else:
            beyond = middle
    return found
