"""What all kernels of a selection know of a row of scores: positions, masses, and the search for a threshold."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(65504.0)
"""Of fp16's numbers."""
PAGE = tl.constexpr(16)


@triton.jit
def row_bounds(
    lengths_ptr,
    recents_ptr,
    page_counts_ptr,
    batch,
    kv_head,
    columns,
    recent,
    KV_HEADS: tl.constexpr,
    RECENTS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Columns of a row behind which there is no key, the tokens of its sequence, and the first of the recent ones."""
    length = tl.load(lengths_ptr + batch)
    if RECENTS:
        recent = tl.load(recents_ptr + batch)
    if PAGES:
        columns = tl.minimum(tl.load(page_counts_ptr + batch * KV_HEADS + kv_head) * PAGE, columns)
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
def masses(score, lse):
    """The weight of each score in units of 2^-40, rounded down. A function of the two numbers alone."""
    weight = tl.minimum(tl.exp2((score - lse) * LOG2E), 1.0)
    return (weight * 1099511627776.0).to(tl.int64)


@triton.jit
def ordered(score):
    """int32 0 to 65,535 in the order of fp16's numbers, equal for equal ones."""
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
def search(
    scores_ptr,
    page_lists_ptr,
    columns,
    length,
    sinks,
    recent_start,
    lse,
    budget,
    room,
    PAGES: tl.constexpr,
    MASSES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest of fp16's numbers, as an integer in their order, below which keys weigh at most ``budget`` and are at
    most ``room``. Two binary digits a pass over the row."""
    found = 0
    for digit in range(8):
        step = 1 << (14 - 2 * digit)
        mass_1 = tl.zeros([TILE], tl.int64)
        mass_2 = tl.zeros([TILE], tl.int64)
        mass_3 = tl.zeros([TILE], tl.int64)
        count_1 = tl.zeros([TILE], tl.int32)
        count_2 = tl.zeros([TILE], tl.int32)
        count_3 = tl.zeros([TILE], tl.int32)
        for start in range(0, columns, TILE):
            column = start + tl.arange(0, TILE)
            score, listed = load_scores(scores_ptr, page_lists_ptr, column, columns, length, sinks, recent_start, PAGES)
            key = tl.where(listed, ordered(score), 65536)
            below_1 = key < found + step
            below_2 = key < found + 2 * step
            below_3 = key < found + 3 * step
            count_1 += below_1.to(tl.int32)
            count_2 += below_2.to(tl.int32)
            count_3 += below_3.to(tl.int32)
            if MASSES:
                mass = masses(score, lse)
                mass_1 += tl.where(below_1, mass, 0)
                mass_2 += tl.where(below_2, mass, 0)
                mass_3 += tl.where(below_3, mass, 0)
        fits_1 = (tl.sum(mass_1, 0) <= budget) & (tl.sum(count_1, 0) <= room)
        fits_2 = (tl.sum(mass_2, 0) <= budget) & (tl.sum(count_2, 0) <= room)
        fits_3 = (tl.sum(mass_3, 0) <= budget) & (tl.sum(count_3, 0) <= room)
        found += step * (fits_1.to(tl.int32) + fits_2.to(tl.int32) + fits_3.to(tl.int32))
    return found
