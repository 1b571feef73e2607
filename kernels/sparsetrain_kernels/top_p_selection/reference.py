"""The selection in plain PyTorch: a threshold for each row of scores, the union over a group, and its positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetrain_kernels.top_p_selection.selection import ONE, PAGE, PositionLists, SelectionInputs

LOG2E = math.log2(math.e)
LEAST = torch.finfo(torch.float16).min
INFINITIES = (2**10 - 1, 2**16 - 2**10)
"""What :func:`ordered` makes of -inf and inf."""


def select(call: SelectionInputs, into: PositionLists) -> None:
    """As :func:`sparsetrain_kernels.top_p_selection.op.top_p_lists`, without a loop over keys and without reading the
    host."""
    if call.due is not None and call.due.device.type == "cpu" and not call.due.any():
        return
    for tensor, found in zip(into, _select(call), strict=True):
        asked = None if call.due is None else call.due.reshape(-1, *[1] * (found.dim() - 1))
        tensor.copy_(found if asked is None else torch.where(asked, found, tensor))


def _select(call: SelectionInputs) -> PositionLists:
    batch, heads, columns = call.scores.shape
    position, is_key = _columns(call)
    recents = torch.full_like(call.lengths, call.recent) if call.recents is None else call.recents
    listed = (position >= call.sinks) & (position < (call.lengths - recents)[:, None, None])
    # By KV head and query head of its group.
    grouped = (batch, call.kv_heads, heads // call.kv_heads)
    rows = call.scores.view(*grouped, columns)
    lse = rows.new_zeros(grouped, dtype=torch.float32) if call.lse is None else call.lse.view(grouped)
    p = call.scores.new_full((heads,), call.p, dtype=torch.float32) if call.p_heads is None else call.p_heads
    p = p.view(1, *grouped[1:])
    is_key = is_key[:, :, None] & (rows > -math.inf)
    if call.group != "union":
        rows = _pooled(rows, lse, is_key, position, call)
        is_key, p = rows > -math.inf, p.amax(2, keepdim=True)
        # Of the k heaviest keys, whose weights need not sum to 1, the rank is the pooled logarithm itself.
        lse = torch.zeros_like(lse[:, :, :1]) if call.newest else rows.float().logsumexp(-1)
    listed = listed[:, :, None] & is_key
    mass = masses(rows, lse)
    always = mass.masked_fill(listed | ~is_key, 0).sum(-1)
    threshold = thresholds(rows, mass, listed, (p.double() * ONE).ceil().long() - always, call.min_keys)
    threshold = threshold.masked_fill(p.expand(threshold.shape) >= 1, -math.inf)
    is_member = listed & (rows >= threshold[..., None])
    # Log of the largest weight that a head which chose the key gives it: what decides where there is no room for all.
    rank = (rows.float() - lse[..., None]).clamp(min=LEAST).half()
    rank = rank.masked_fill(~is_member, -math.inf).amax(2)
    return _fit(rank, position, call)


def _columns(call: SelectionInputs) -> tuple[Tensor, Tensor]:
    """The position of each column, and whether it is one of a key; ``[B, 1 or Hkv, M]``."""
    column = torch.arange(call.scores.shape[2], dtype=torch.int32, device=call.scores.device)
    if call.page_lists is None or call.page_counts is None:
        position = column.expand(1, 1, -1)
        return position, position < call.lengths[:, None, None]
    position = call.page_lists[..., column // PAGE] * PAGE + column % PAGE
    is_key = (column < call.page_counts[..., None] * PAGE) & (position < call.lengths[:, None, None])
    return position, is_key


def _pooled(rows: Tensor, lse: Tensor, is_key: Tensor, position: Tensor, call: SelectionInputs) -> Tensor:
    """Log of the group's largest or mean weight, in fp16, ``[B, Hkv, 1, M]``; -inf where there is no key."""
    weights = (rows.float() - lse[..., None]).masked_fill(~is_key, -math.inf)
    if call.group == "max":
        pooled = weights.amax(2, keepdim=True)
    else:
        pooled = weights.logsumexp(2, keepdim=True) - math.log(rows.shape[2])
    some = is_key.any(2, keepdim=True)
    pooled = pooled.clamp(min=LEAST).half().masked_fill(~some, -math.inf)
    best, at = pooled, position.expand(pooled.shape[0], pooled.shape[1], -1)[:, :, None]
    for step in range(1, call.width // 2 + 1):
        # Candidate pages need not follow one another.
        near = at[..., step:] == at[..., :-step] + step
        best = torch.cat(
            (
                best[..., :step],
                torch.maximum(best[..., step:], pooled[..., :-step].masked_fill(~near, -math.inf)),
            ),
            -1,
        )
        best = torch.cat(
            (
                torch.maximum(best[..., :-step], pooled[..., step:].masked_fill(~near, -math.inf)),
                best[..., -step:],
            ),
            -1,
        )
    return best.masked_fill(~some, -math.inf)


def ordered(scores: Tensor) -> Tensor:
    """int32 0 to 65,535 in the order of the fp16 numbers, equal for equal ones."""
    bits = (scores + 0.0).view(torch.int16).int()
    return (bits ^ ((bits >> 15) & 0x7FFF)) + 2**15


def masses(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax weight of each fp16 score as an integer, in units of 2^-40, rounded down. A function of the two
    numbers alone, so that sums have the same bits in any order."""
    return (torch.exp2((scores.float() - lse[..., None]) * LOG2E).clamp(max=1.0) * ONE).long()


def thresholds(rows: Tensor, mass: Tensor, listed: Tensor, least_mass: Tensor, min_keys: int) -> Tensor:
    """The largest number from which on the listed keys have the least mass and are the least number, fp16 ``[...]``;
    -inf where all are not enough. ``mass`` is that of each key (:func:`masses`)."""
    keys, order = ordered(rows).masked_fill(~listed, -1).sort(-1, descending=True)
    mass = mass.masked_fill(~listed, 0).gather(-1, order).cumsum(-1)
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    short = ((mass < least_mass[..., None]) | (count < min_keys)).sum(-1, keepdim=True)
    # Those before and this key are enough; every number is where none are needed.
    found = torch.nn.functional.pad(keys, (0, 1), value=0).gather(-1, short)[..., 0]
    found = found.masked_fill((least_mass <= 0) & (min_keys <= 0), 2**16 - 1)
    bits = found.clamp(*INFINITIES) - 2**15
    return (bits ^ ((bits >> 15) & 0x7FFF)).to(torch.int16).view(torch.float16)


def _fit(rank: Tensor, position: Tensor, call: SelectionInputs) -> PositionLists:
    """The members in ascending order; where there are more than ``capacity``, those of the highest rank."""
    is_member = rank > -math.inf
    members = is_member.sum(-1)
    # Nothing waits for a CPU, where the host may look.
    kept = is_member if rank.device.type == "cpu" and members.max() <= call.capacity else _heaviest(rank, members, call)
    place = kept.cumsum(-1) - 1
    # One place more, for all that is not listed.
    lists = position.new_full((*members.shape, call.capacity + 1), -1)
    place = place.masked_fill(~kept, call.capacity)
    lists.scatter_(-1, place, position.expand(rank.shape))
    counts = kept.sum(-1)
    return PositionLists(lists[..., :-1].contiguous(), counts.int(), (members - counts).int())


def _heaviest(rank: Tensor, members: Tensor, call: SelectionInputs) -> Tensor:
    """Which members have a place, bool like ``rank``, where there are more than ``capacity`` of some."""
    zero = torch.zeros_like(members)
    # The rank of the first that has no room.
    level = thresholds(rank, masses(rank, zero.float()), rank > -math.inf, zero, call.capacity + 1)
    level = level.masked_fill(members <= call.capacity, -math.inf)[..., None]
    above, tied = rank > level, (rank > -math.inf) & (rank == level)
    room = (call.capacity - above.sum(-1)) * call.newest
    older = tied.sum(-1) - room
    return above | (tied & (tied.cumsum(-1) > older[..., None]))
