"""The kernels: a row is read once and held, or where it is too long, read from the cache again and again.

Everything is fp32. Forward halves the interval of the threshold until it is known to 26 bits, then solves for what is
inside (2406.16747, Algorithm 1, without its sort).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sparsek_fwd_kernel(
    z_ptr, k_ptr, p_ptr, tau_ptr, rest_ptr, entries, z_stride, k_stride, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """``p [R, M]``, and the two parts of each row's threshold."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    p_ptr += row * entries
    k = tl.load(k_ptr + row * k_stride).to(tl.float32)
    held = _read(z_ptr, 0, entries, BLOCK)

    peak = float("-inf")
    least = float("inf")
    count = 0
    broken = 0
    for start in tl.range(0, entries, BLOCK):
        z = held if HELD else _read(z_ptr, start, entries, BLOCK)
        is_there = z > float("-inf")
        broken += tl.sum(((z != z) | (z == float("inf"))).to(tl.int32), 0)
        count += tl.sum(is_there.to(tl.int32), 0)
        peak = tl.maximum(peak, tl.max(z, 0))
        least = tl.minimum(least, tl.min(tl.where(is_there, z, float("inf")), 0))

    # Counted from the largest entry: the sum of the gates is count, more than k, at the low end and 0 at the high end.
    low = least - peak - 1
    high = low * 0
    middle = low / 2
    searching = (count > k) & (broken == 0)
    while searching & (middle > low) & (middle < high) & (high - low > 2.0**-26):
        surplus, _ = _surplus(z_ptr, held, peak, middle, k, entries, BLOCK, HELD)
        low = tl.where(surplus > 0, middle, low)
        high = tl.where(surplus > 0, high, middle)
        middle = (low + high) / 2
    # Solved at the number nearest to the threshold, from which the entries that matter differ exactly.
    tau = peak + high
    surplus, inside = _surplus(z_ptr, held, tau, 0.0, k, entries, BLOCK, HELD)
    rest = surplus / tl.maximum(inside, 1).to(tl.float32)
    is_partial = count > k
    rest = tl.where(is_partial & (broken == 0), rest, 0.0)
    tau = tl.where(is_partial, tau, float("-inf"))
    tau = tl.where(broken > 0, float("nan"), tau)
    tl.store(tau_ptr + row, tau)
    tl.store(rest_ptr + row, rest)

    for start in tl.range(0, entries, BLOCK):
        z = held if HELD else _read(z_ptr, start, entries, BLOCK)
        gate = z - tau - rest
        p = tl.where(gate >= 1, 1.0, tl.where(gate <= 0, 0.0, gate))
        p = tl.where(z == float("-inf"), 0.0, p)
        column = start + tl.arange(0, BLOCK)
        tl.store(p_ptr + column, p.to(p_ptr.dtype.element_ty), mask=column < entries)


@triton.jit
def sparsek_bwd_kernel(
    grad_ptr,
    z_ptr,
    tau_ptr,
    rest_ptr,
    grad_z_ptr,
    grad_k_ptr,
    entries,
    grad_stride,
    z_stride,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """The gradient inside less its mean, and the mean, which is the gradient of k."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    z_ptr += row * z_stride
    grad_z_ptr += row * entries
    tau = tl.load(tau_ptr + row)
    rest = tl.load(rest_ptr + row)
    held = _read(z_ptr, 0, entries, BLOCK)
    held_grad = _read(grad_ptr, 0, entries, BLOCK)

    total = 0.0
    count = 0
    for start in tl.range(0, entries, BLOCK):
        z = held if HELD else _read(z_ptr, start, entries, BLOCK)
        grad = held_grad if HELD else _read(grad_ptr, start, entries, BLOCK)
        gate = z - tau - rest
        inside = (gate > 0) & (gate < 1)
        total += tl.sum(tl.where(inside, grad, 0.0), 0)
        count += tl.sum(inside.to(tl.int32), 0)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    mean = tl.where(tau != tau, float("nan"), mean)
    tl.store(grad_k_ptr + row, mean)

    for start in tl.range(0, entries, BLOCK):
        z = held if HELD else _read(z_ptr, start, entries, BLOCK)
        grad = held_grad if HELD else _read(grad_ptr, start, entries, BLOCK)
        gate = z - tau - rest
        inside = (gate > 0) & (gate < 1)
        # Outside it is zero, and NaN in a row of NaN.
        grad_z = tl.where(inside, grad - mean, mean - mean)
        column = start + tl.arange(0, BLOCK)
        tl.store(grad_z_ptr + column, grad_z.to(grad_z_ptr.dtype.element_ty), mask=column < entries)


@triton.jit
def _surplus(z_ptr, held, base, above, k, entries, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """At the threshold ``base + above``: the sum of the gates less k, and how many are between 0 and 1. Gates of 1 are
    counted, not added up, so that a large k costs no precision."""
    total = 0.0
    saturated = 0
    count = 0
    for start in tl.range(0, entries, BLOCK):
        z = held if HELD else _read(z_ptr, start, entries, BLOCK)
        gate = z - base - above
        inside = (gate > 0) & (gate < 1)
        total += tl.sum(tl.where(inside, gate, 0.0), 0)
        count += tl.sum(inside.to(tl.int32), 0)
        saturated += tl.sum((gate >= 1).to(tl.int32), 0)
    return saturated - k + total, count


@triton.jit
def _read(ptr, start, entries, BLOCK: tl.constexpr):
    """A block of a row in fp32; ``-inf`` beyond its end."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(ptr + column, mask=column < entries, other=float("-inf")).to(tl.float32)
