"""SPARSEK and hard top-k of every prefix at once (2406.16747, section 3.2): plain PyTorch, exact.

As rows go by, keys are only added, so what a key may claim only shrinks: its gate goes 1, between, 0, and never back,
and once it has left the top k it stays out. What is needed of a key is therefore a few rows: the first at which the
threshold has passed its score minus one, the first at which it has passed its score, the first at which ``topk`` better
keys are there. The thresholds follow from the keys that are inside then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.causal_selection.axis import ONE, Axis, by_point, flatten_tokens, head_offsets, to_axis
from sparsetrain_kernels.causal_selection.crossing import first_row_of_better_keys, first_row_past_points, running_count
from sparsetrain_kernels.causal_selection.selection import CausalSelection


def select(scores: Tensor, topk: int, window: int, sinks: int, cu_seqlens: Tensor | None) -> CausalSelection:
    """:func:`~sparsetrain_kernels.causal_selection.causal_sparsek` without its gradient."""
    length = scores.shape[2]
    topk, window, sinks = (min(number, length) for number in (topk, window, sinks))
    flat = flatten_tokens(scores, window, sinks, cu_seqlens)
    axis = to_axis(scores.flatten().take(flat.order), flat.start)
    entry = flat.entry.take(flat.order).long()
    arrived = running_count(entry[None], entry.numel())[0]

    absent = entry - 1
    exit = first_row_of_better_keys(flat, absent, arrived, topk, length).maximum(entry).int()
    passed = first_row_past_points(flat, axis, absent, arrived, topk, length)
    interior_start = passed.take(axis.below).maximum(entry)
    interior_end = passed.take(axis.point).maximum(entry)
    interior = _difference(interior_start, interior_end)
    saturated = _difference(entry, interior_start)
    mass = _difference(interior_start, interior_end, axis.coordinate)

    threshold = _thresholds(axis, passed, interior, mass + (saturated - topk) * ONE)
    row = torch.arange(flat.start.numel(), device=scores.device)
    candidates = row - (window - 1) - flat.start - sinks
    threshold.masked_fill_(candidates <= topk, float("-inf"))

    def by_token(rows: Tensor) -> Tensor:
        flat_rows = torch.empty_like(flat.start).scatter_(0, flat.order, rows.int())
        return flat_rows.view(scores.shape).sub_(head_offsets(scores))

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
    per_key = torch.where(interior_size > 0, grad_threshold.double() / interior_size.clamp(min=1), 0.0)
    largest = per_key.abs().amax()
    # The sum of a document fits into 62 bits. NaN and infinity make the whole gradient NaN.
    unit = torch.where(largest == 0, 1.0, largest / 2.0 ** (62 - length.bit_length()))
    running = torch.zeros(per_key.numel() + 1, dtype=torch.int64, device=per_key.device)
    torch.cumsum((per_key / unit).round_().long().flatten(), 0, out=running[1:])
    offset = head_offsets(grad_threshold).long()
    grad = running.take(interior_end + offset) - running.take(interior_start + offset)
    return (grad * unit).to(grad_threshold.dtype)


def _thresholds(axis: Axis, passed: Tensor, interior: Tensor, mass: Tensor) -> Tensor:
    """The exact thresholds ``mass / interior``, rounded down to multiples of ``1 / ONE``, as numbers: fp64 ``[L]``.

    Args:
        axis: the scores as integers.
        passed: int64 ``[2 * L]``: the first row that has passed each point.
        interior: int64 ``[L]``, of each row.
        mass: int64 ``[L]``: the sum of the coordinates of a row's interior, plus ``ONE`` for each key missing in
            ``topk`` saturated ones.
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
    above = mass - interior * (axis.coordinate.take(key) - lower * ONE - fraction)
    above = torch.where(interior > 0, above.div(interior.clamp(min=1), rounding_mode="floor"), fraction)
    carry = above.div(ONE, rounding_mode="floor")
    return (axis.whole.take(key) + (carry - lower)) + (above - carry * ONE).double() / ONE


def _difference(start: Tensor, end: Tensor, weight: Tensor | None = None) -> Tensor:
    """int64 ``[L]``: of each row, the keys with ``start <= row < end``, or the sum of their weights."""
    weight = torch.ones_like(start, dtype=torch.int64) if weight is None else weight
    total = torch.zeros(start.numel() + 1, dtype=torch.int64, device=start.device)
    total.scatter_add_(0, start.long(), weight).scatter_add_(0, end.long(), -weight)
    return total.cumsum_(0)[:-1]
