"""The gradient of thresholds: what each row gives to the keys of its interior, as integers, and what each key collects.

The arithmetic is that of ``causal_selection.reference.threshold_gradient``, bit for bit, in a few launches.
"""

import triton
import triton.language as tl

WHOLE = tl.constexpr(4503599627370496.0)
"""``2 ** 52``: from there on, numbers are whole; below, adding it and taking it away again rounds, halves to even."""


@triton.jit
def gradient_largest_kernel(grad_ptr, size_ptr, largest_ptr, line, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """fp64 ``[PARTS]``: the largest share, without its sign, of every ``PARTS``-th block of rows. NaN is the largest.

    As integers, the bits of numbers from 0 to infinity and NaN are in the order of the numbers.
    """
    largest = tl.full([BLOCK], 0, tl.int64)
    for start in range(tl.program_id(0) * BLOCK, line, PARTS * BLOCK):
        share = tl.abs(_share(grad_ptr, size_ptr, start + tl.arange(0, BLOCK), line))
        largest = tl.maximum(largest, share.to(tl.int64, bitcast=True))
    tl.store(largest_ptr + tl.program_id(0), tl.max(largest, 0))


@triton.jit
def gradient_steps_kernel(
    grad_ptr, size_ptr, largest_ptr, step_ptr, line, to_unit, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """int64 ``[L + 1]``: 0, and the share of each row in units, of which the running sums fit into 63 bits."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = _unit(largest_ptr, to_unit, PARTS)
    share = _share(grad_ptr, size_ptr, place, line) / unit
    size = tl.abs(share)
    size = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size)
    step = tl.where(share < 0, -size, size).to(tl.int64)
    tl.store(step_ptr + 1 + place, step, mask=place < line)
    tl.store(step_ptr + place, step * 0, mask=place == 0)


@triton.jit
def gradient_collect_kernel(
    running_ptr,
    start_ptr,
    end_ptr,
    largest_ptr,
    grad_scores_ptr,
    line,
    tokens,
    to_unit,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of each key's score: the shares of the rows ``[start, end)`` in which it is in the interior."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < line
    running_ptr += place // tokens * tokens
    start = tl.load(start_ptr + place, mask=inside, other=0)
    end = tl.load(end_ptr + place, mask=inside, other=0)
    units = tl.load(running_ptr + end, mask=inside, other=0) - tl.load(running_ptr + start, mask=inside, other=0)
    grad = units.to(tl.float64) * _unit(largest_ptr, to_unit, PARTS)
    tl.store(grad_scores_ptr + place, grad.to(grad_scores_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _share(grad_ptr, size_ptr, place, line):
    """A row's gradient, divided among its interior."""
    inside = place < line
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float64)
    size = tl.load(size_ptr + place, mask=inside, other=0)
    return tl.where(size > 0, grad / tl.maximum(size, 1).to(tl.float64), 0.0)


@triton.jit
def _unit(largest_ptr, to_unit, PARTS: tl.constexpr):
    """What an integer of one stands for."""
    largest = tl.max(tl.load(largest_ptr + tl.arange(0, PARTS)), 0).to(tl.float64, bitcast=True)
    return tl.where(largest == 0, 1.0, largest * to_unit)
