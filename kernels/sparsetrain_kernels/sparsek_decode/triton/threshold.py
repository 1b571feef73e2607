"""The threshold of a buffer of scores, without sorting it: Newton's method in an interval that is never left."""

import triton
import triton.language as tl

STEPS = tl.constexpr(4)
"""Every so many steps the interval is halved whatever Newton's method says, which bounds their number."""


@triton.jit
def solve_threshold(
    buffer_ptr, held, replaced, score, before, TOPK: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """The fp32 threshold of ``ENTRIES`` scores, ``TOPK`` of which fit: -inf if there are no more, NaN if one is not a
    number below infinity.

    The search is in fp64. It starts at the threshold ``before`` the last token, which is mostly right but for a few
    scores, and ends where the gates' sum is ``TOPK`` to its rounding: a last step is then exact for the gates inside.
    Where it does not determine the threshold (``TOPK`` scores lead by 1 or more), it is the smallest that does. So the
    result depends on the scores alone.

    Args:
        held: the first ``BLOCK`` entries, before one of them was replaced.
        replaced, score: the entry that is ``score`` now; -1 for none.
    """
    TOLERANCE: tl.constexpr = TOPK * 2.0**-44
    held = tl.where(tl.arange(0, BLOCK) == replaced, score, held)
    peak = float("-inf")
    least = float("inf")
    count = 0
    broken = 0
    for start in tl.range(0, ENTRIES, BLOCK):
        z = held if BLOCK >= ENTRIES else read_entries(buffer_ptr, start, ENTRIES, BLOCK, replaced, score)
        is_there = z > float("-inf")
        broken += tl.sum(((z != z) | (z == float("inf"))).to(tl.int32), 0)
        count += tl.sum(is_there.to(tl.int32), 0)
        peak = tl.maximum(peak, tl.max(z, 0))
        least = tl.minimum(least, tl.min(tl.where(is_there, z, float("inf")), 0))
    is_partial = (count > TOPK) & (broken == 0)

    # The sum of the gates is count, more than TOPK, at the low end and 0 at the high end.
    low = tl.where(is_partial, least, 0.0).to(tl.float64) - 1
    high = tl.where(is_partial, peak, 0.0).to(tl.float64)
    start_at = before.to(tl.float64)
    tau = tl.where((start_at > low) & (start_at < high), start_at, (low + high) * 0.5)
    surplus, inside = _surplus(buffer_ptr, held, replaced, score, tau, TOPK, ENTRIES, BLOCK)
    step = 0
    searching = is_partial & (tl.abs(surplus) > TOLERANCE)
    while searching:
        low = tl.where(surplus > 0, tau, low)
        high = tl.where(surplus > 0, high, tau)
        newton = tau + surplus / tl.maximum(inside, 1).to(tl.float64)
        is_good = (inside > 0) & (newton > low) & (newton < high) & (step % STEPS != STEPS - 1)
        tau = tl.where(is_good, newton, (low + high) * 0.5)
        surplus, inside = _surplus(buffer_ptr, held, replaced, score, tau, TOPK, ENTRIES, BLOCK)
        step += 1
        searching = (tl.abs(surplus) > TOLERANCE) & (tau > low) & (tau < high)
    below = _largest_below(buffer_ptr, held, replaced, score, tau, ENTRIES, BLOCK).to(tl.float64)
    tau = tl.where(inside > 0, tau + surplus / tl.maximum(inside, 1).to(tl.float64), below)
    threshold = tl.where(is_partial, tau.to(tl.float32), float("-inf"))
    return tl.where(broken > 0, float("nan"), threshold)


@triton.jit
def _surplus(buffer_ptr, held, replaced, score, tau, TOPK: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """At a threshold: the sum of the gates less ``TOPK``, and how many are between 0 and 1."""
    total = tl.zeros([], tl.float64)
    inside = 0
    for start in tl.range(0, ENTRIES, BLOCK):
        z = held if BLOCK >= ENTRIES else read_entries(buffer_ptr, start, ENTRIES, BLOCK, replaced, score)
        gate = z.to(tl.float64) - tau
        total += tl.sum(tl.where(gate > 0, tl.where(gate < 1, gate, 1.0), 0.0), 0)
        inside += tl.sum(((gate > 0) & (gate < 1)).to(tl.int32), 0)
    return total - TOPK, inside


@triton.jit
def _largest_below(buffer_ptr, held, replaced, score, tau, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """The largest score that has no gate of 1 at a threshold."""
    largest = float("-inf")
    for start in tl.range(0, ENTRIES, BLOCK):
        z = held if BLOCK >= ENTRIES else read_entries(buffer_ptr, start, ENTRIES, BLOCK, replaced, score)
        is_below = z.to(tl.float64) - tau < 1
        largest = tl.maximum(largest, tl.max(tl.where(is_below, z, float("-inf")), 0))
    return largest


@triton.jit
def read_entries(buffer_ptr, start, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, replaced, score):
    """``BLOCK`` entries of the buffer from ``start`` on, with the one at ``replaced`` as it will be; -inf beyond the
    end."""
    column = start + tl.arange(0, BLOCK)
    z = tl.load(buffer_ptr + column, mask=column < ENTRIES, other=float("-inf"))
    return tl.where(column == replaced, score, z)
