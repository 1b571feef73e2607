"""SPARSEK and hard top-k of every prefix at once (2406.16747, section 3.2): plain PyTorch, exact.

As rows go by, keys are only added, so what a key may claim only shrinks: its gate goes 1, between, 0, and never back,
and once it has left the top k it stays out. What is needed of a key is therefore a few rows: the first at which the
threshold has passed its score minus one, the first at which it has passed its score, the first at which ``topk`` better
keys are there. The thresholds follow from the keys that are inside then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.sparsek.causal_line import ONE, Axis, by_point, line_up, offsets, to_axis
from sparsetrain_kernels.sparsek.causal_search import first_row_of_better_keys, first_row_past_points, running_count


class CausalSelection(NamedTuple):
    """Which keys compete for and win the ``topk`` places of each row. All ``[B, H, N]``; rows are indices along N."""

    threshold: Tensor
    """Of row i: the sum of ``clip(u_j - threshold_i, 0, 1)`` over its candidates is ``topk``; the smallest such number.
    ``-inf`` where it has at most ``topk`` candidates. In the scores' dtype, non-decreasing within a document."""
    exit: Tensor
    """int32: key j is among the top k of the rows ``[j + window, exit_j)``; of sinks and of keys that never leave the
    window, the end of their document."""
    interior_start: Tensor
    """int32: key j has ``0 < u_j - threshold_i < 1`` in the rows ``[start_j, end_j)``, in the top k or not."""
    interior_end: Tensor
    """int32."""
    interior_size: Tensor
    """int32, of a row: candidates with ``0 < u_j - threshold_i < 1``."""
    saturated_size: Tensor
    """int32, of a row: candidates with ``u_j - threshold_i >= 1``."""


def select(scores: Tensor, topk: int, window: int, sinks: int, cu_seqlens: Tensor | None) -> CausalSelection:
    """:func:`~sparsetrain_kernels.sparsek.causal_sparsek` without its gradient."""
    length = scores.shape[2]
    topk, window, sinks = (min(number, length) for number in (topk, window, sinks))
    line = line_up(scores, window, sinks, cu_seqlens)
    axis = to_axis(scores.flatten().take(line.order), line.start)
    entry = line.entry.take(line.order).long()
    arrived = running_count(entry[None], entry.numel())[0]

    absent = entry - 1
    exit = first_row_of_better_keys(line, absent, arrived, topk, length).maximum(entry).int()
    passed = first_row_past_points(line, axis, absent, arrived, topk, length)
    interior_start = passed.take(axis.below).maximum(entry)
    interior_end = passed.take(axis.point).maximum(entry)
    interior = _difference(interior_start, interior_end)
    saturated = _difference(entry, interior_start)
    mass = _difference(interior_start, interior_end, axis.place)

    threshold = _thresholds(axis, passed, interior, mass + (saturated - topk) * ONE)
    row = torch.arange(line.start.numel(), device=scores.device)
    candidates = row - (window - 1) - line.start - sinks
    threshold.masked_fill_(candidates <= topk, float("-inf"))

    def by_token(rows: Tensor) -> Tensor:
        on_line = torch.empty_like(line.start).scatter_(0, line.order, rows.int())
        return on_line.view(scores.shape).sub_(offsets(scores))

    return CausalSelection(
        threshold=threshold.to(scores.dtype).view(scores.shape),
        exit=by_token(exit),
        interior_start=by_token(interior_start),
        interior_end=by_token(interior_end),
        interior_size=interior.int().view(scores.shape),
        saturated_size=saturated.int().view(scores.shape),
    )


def threshold_gradient(
    grad_threshold: Tensor, interior_start: Tensor, interior_end: Tensor, interior_size: Tensor
) -> Tensor:
    """The scores' gradient from the thresholds': ``d threshold_i / d u_j`` is one over the size of row i's interior.

    A key collects its rows as the difference of two running sums. These are of integers, like all sums here: the same
    on every run.

    Args:
        grad_threshold: ``[B, H, N]``.
        interior_start, interior_end, interior_size: of the :class:`CausalSelection`.

    Returns:
        ``[B, H, N]`` in the dtype of ``grad_threshold``.
    """
    length = grad_threshold.shape[2]
    share = torch.where(interior_size > 0, grad_threshold.double() / interior_size.clamp(min=1), 0.0)
    largest = share.abs().amax()
    # The sum of a document fits into 62 bits. NaN and infinity make the whole gradient NaN.
    unit = torch.where(largest == 0, 1.0, largest / 2.0 ** (62 - length.bit_length()))
    running = torch.zeros(share.numel() + 1, dtype=torch.int64, device=share.device)
    torch.cumsum((share / unit).round_().long().flatten(), 0, out=running[1:])
    offset = offsets(grad_threshold).long()
    grad = running.take(interior_end + offset) - running.take(interior_start + offset)
    return (grad * unit).to(grad_threshold.dtype)


def _thresholds(axis: Axis, passed: Tensor, interior: Tensor, mass: Tensor) -> Tensor:
    """The exact thresholds ``mass / interior``, rounded down to multiples of ``1 / ONE``, as numbers: fp64 ``[L]``.

    Args:
        axis: the scores as integers.
        passed: int64 ``[2 * L]``: the first row that has passed each point.
        interior: int64 ``[L]``, of each row.
        mass: int64 ``[L]``: the sum of the places of a row's interior, plus ``ONE`` for each key missing in ``topk``
            saturated ones.
    """
    tokens = interior.numel()
    rank = torch.arange(tokens, device=interior.device)
    key_of_point = by_point(axis, rank, rank + tokens)
    # The highest point that a row has passed: its threshold where no key is inside, else less than one below it.
    last = torch.searchsorted(passed, rank, right=True).sub_(1).clamp_(min=0)
    key = key_of_point.take(last)
    lower = (key >= tokens).long()
    key -= lower * tokens
    # Everything counts from the whole number under that point: small, exact, and the same whichever point it was.
    fraction = axis.fraction.take(key)
    above = mass - interior * (axis.place.take(key) - lower * ONE - fraction)
    above = torch.where(interior > 0, above.div(interior.clamp(min=1), rounding_mode="floor"), fraction)
    carry = above.div(ONE, rounding_mode="floor")
    return (axis.whole.take(key) + (carry - lower)) + (above - carry * ONE).double() / ONE


def _difference(start: Tensor, end: Tensor, weight: Tensor | None = None) -> Tensor:
    """int64 ``[L]``: of each row, the keys with ``start <= row < end``, or the sum of their weights."""
    weight = torch.ones_like(start, dtype=torch.int64) if weight is None else weight
    total = torch.zeros(start.numel() + 1, dtype=torch.int64, device=start.device)
    total.scatter_add_(0, start.long(), weight).scatter_add_(0, end.long(), -weight)
    return total.cumsum_(0)[:-1]
