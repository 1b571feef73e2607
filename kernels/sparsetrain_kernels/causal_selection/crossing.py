"""The rows at which things happen to a key, for all keys at once: plain PyTorch, in a few passes over sorted arrays.

All are answers to one kind of question about a point ``v`` on the axis of scores,

    T(v) = first row i with f_i(v) > topk,    f_i(v) = sum over the candidates j of row i of clip(u_j - v, 0, 1)

As rows go by, candidates are only added: f grows with i, falls with v, and T is monotone in v. So guesses t(v) for all
points can be monotone too, and a round of the search walks along this staircase of (t, v) once: running sums give f at
all of its steps. Each round fixes one digit of T; the known digits of monotone numbers are monotone as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrain_kernels.causal_selection.axis import ONE, Axis, FlatTokens, by_point

CUDA_WORK = 2**21
"""Steps of staircases in a round, which is about 25 launches: on fewer steps these would cost more than their work."""
CPU_WORK = 2**14
"""They stay in the cache."""


def first_row_past_points(
    flat: FlatTokens, axis: Axis, absent: Tensor, arrived: Tensor, topk: int, length: int
) -> Tensor:
    """int64 ``[2 * L]``, by point: the first row with ``threshold >= u_j`` or ``threshold > u_j - 1``, or the
    document's end.

    The threshold is the smallest number with ``f <= topk``. So it is beyond a point exactly if f is larger there, and
    it is at the point or beyond if f is larger just before.

    Args:
        flat, axis: the call's tokens and scores.
        absent: int64 ``[L]``, by rank: the last row in which a key does not compete yet.
        arrived: int64 ``[L + 1]``: the keys that compete in a row, and all others that did in earlier ones.
        topk: what f is compared with.
        length: rows of the longest document that there may be.
    """
    tokens, coordinate = absent.numel(), axis.coordinate
    above_whole, minus_coordinate = coordinate - ONE, -coordinate
    value = by_point(axis, coordinate, above_whole)
    is_point = torch.zeros_like(value, dtype=torch.int8).index_fill_(0, axis.point, 1)
    arrived_mass = arrived * ONE
    one = value.new_ones(1)

    def staircases(row: Tensor) -> tuple[Tensor, Tensor]:
        """At each step, the gates between 0 and 1, and the sum of their coordinates plus ONE for those of 1, less ONE
        for each key that is there."""
        each = (len(row), tokens)
        # From the step at which a key arrives its gate is 1 until its lower point, then between 1 and 0 until its
        # upper one.
        arrival = _arrivals(row, absent)
        inside_from, inside_to = arrival.maximum(axis.below), torch.maximum(arrival, axis.past_point, out=arrival)
        # Every staircase adds up to zero, so that one running sum serves all of them.
        inside = value.new_zeros(len(row), 2 * tokens + 1)
        inside.scatter_add_(1, inside_from, one.expand(each)).scatter_add_(1, inside_to, (-one).expand(each))
        mass = value.new_zeros(len(row), 2 * tokens + 1)
        mass[:, -1].fill_(tokens * ONE)
        mass.scatter_add_(1, inside_from, above_whole.expand(each))
        mass.scatter_add_(1, inside_to, minus_coordinate.expand(each))
        inside, mass = (sums.view(-1).cumsum_(0).view(len(row), -1)[:, :-1] for sums in (inside, mass))
        return inside, mass

    def short(row: Tensor) -> Tensor:
        inside, f = staircases(row)
        f.add_(arrived_mass.take(row)).addcmul_(inside, value, value=-1)
        # Just before the point, f is larger if a key is inside there.
        f.add_(inside.minimum(is_point))
        return f <= topk * ONE

    start, end = (bound[:, None].expand(-1, 2).flatten() for bound in (flat.start, flat.end))
    return _first_rows(start, end, length, short)


def first_row_of_better_keys(flat: FlatTokens, absent: Tensor, arrived: Tensor, topk: int, length: int) -> Tensor:
    """int64 ``[L]``, by rank: the first row at which ``topk`` keys of higher rank compete, or the document's end.

    Takes the arguments of :func:`first_row_past_points`.
    """
    rank = torch.arange(absent.numel(), device=absent.device)
    one = rank.new_ones(1)

    def short(row: Tensor) -> Tensor:
        worse = rank.new_zeros(len(row), absent.numel() + 1)
        worse[:, -1].fill_(-absent.numel())
        worse.scatter_add_(1, _arrivals(row, absent).maximum(rank), one.expand(row.shape))
        worse = worse.view(-1).cumsum_(0).view(len(row), -1)[:, :-1]
        return arrived.take(row) - worse < topk

    return _first_rows(flat.start, flat.end, length, short)


def _first_rows(start: Tensor, end: Tensor, length: int, short: Callable[[Tensor], Tensor]) -> Tensor:
    """The first row from ``start`` at which a point is no longer ``short``, at most ``end``.

    Args:
        start, end: int32 ``[points]``; no more than ``length`` apart.
        length: on the host, as the number of rounds follows from it.
        short: from rows, int64 ``[guesses, points]``, ascending along the points, whether f is still short of ``topk``
            there. Once it is not, it must not be in any later row up to ``end``.

    Returns:
        int64 ``[points]``.
    """
    work = CUDA_WORK if start.is_cuda else CPU_WORK
    base, rounds = _digits(length, max(2, work // start.numel() + 1))
    step = torch.arange(1, base, device=start.device)[:, None]
    known, end = start.long() - 1, end.long()
    for digit in reversed(range(rounds)):
        rows = torch.add(known, step, alpha=base**digit).minimum(end)
        known.add_(short(rows).sum(0), alpha=base**digit)
    return known.add_(1).minimum(end)


def _digits(length: int, largest_base: int) -> tuple[int, int]:
    """The smallest base that needs as few digits for the numbers up to ``length`` as the largest does."""
    rounds = next(n for n in range(1, 64) if largest_base**n > length)
    base = next(b for b in range(2, largest_base + 1) if b**rounds > length)
    return base, rounds


def _arrivals(row: Tensor, absent: Tensor) -> Tensor:
    """int64 ``[guesses, L]``: the first step of each staircase, ``row[step] > absent``, at which a key is there."""
    return running_count(row, absent.numel()).index_select(1, absent)


def running_count(rows: Tensor, largest: int) -> Tensor:
    """int64 ``[guesses, largest + 1]``: how many ``rows [guesses, X]`` are at most 0, 1, ..."""
    count = rows.new_zeros(len(rows), largest + 1)
    # Each guess takes back the sum of the one before, so that one running sum serves all of them.
    count[1:, 0].fill_(-rows.shape[1])
    count.scatter_add_(1, rows, rows.new_ones(1).expand(rows.shape))
    return count.view(-1).cumsum_(0).view(count.shape)
