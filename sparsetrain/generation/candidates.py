"""What a step considers: all keys, pages of 16 tokens, or single tokens; and how of these are chosen those it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sparsetrain_kernels.top_p_selection import PositionLists
from torch import Tensor

GRANULE = 16
"""Tokens of a page of candidates."""
ROW = 16
"""Columns of scores come in multiples of this, which are written fastest."""


class Always(NamedTuple):
    """What a step reads in any case."""

    lengths: Tensor
    """int32 ``[B]``: tokens of each row."""
    sinks: int
    """First tokens."""
    recent: int | Tensor
    """Last tokens, or int32 ``[B]``."""


class Candidates:
    """All keys. Scores have a column for each position."""

    most: int | None = None
    """Tokens of a KV head at most; None where all keys are candidates."""
    pooled = 7
    """Neighbours of which a key has the largest weight where RefreshKV chooses a number of keys."""

    def scored(self) -> dict[str, Any]:
        """Arguments of :func:`~sparsetrain_kernels.estimate_scores`."""
        return {}

    def choose(
        self, choose: Callable[..., PositionLists], scores: Tensor, lse: Tensor, always: Always, **given: Any
    ) -> PositionLists:
        """Positions of some candidates.

        Args:
            choose: :func:`~sparsetrain_kernels.top_p_lists`, or another that takes its arguments.
            scores: fp16 ``[B, Hq, columns]``, of these candidates.
            lse: fp32 ``[B, Hq]``.
            always: what is not listed, because it is read in any case.
            given: further arguments.
        """
        return choose(scores, lse, **always._asdict(), **given)

    def positions(self, always: Always) -> tuple[Tensor, Tensor]:
        """All candidates that are not read in any case. What lies behind a count is undefined.

        Returns:
            Ascending positions, int32 ``[B, Hkv, most]``, and how many there are, int32 ``[B, Hkv]``.
        """
        raise NotImplementedError("all keys are read by dense attention, not as a list")


class Pages(Candidates):
    """Pages of 16 tokens.

    Args:
        lists: int32 ``[B, Hkv, P]``, ascending numbers.
        counts: int32 ``[B, Hkv]``, entries of each list.
    """

    def __init__(self, lists: Tensor, counts: Tensor) -> None:
        self.lists, self.counts = lists, counts
        self.most = lists.shape[-1] * GRANULE

    def scored(self) -> dict[str, Any]:
        """See :meth:`Candidates.scored`."""
        return {"page_lists": self.lists, "page_counts": self.counts}

    def choose(
        self, choose: Callable[..., PositionLists], scores: Tensor, lse: Tensor, always: Always, **given: Any
    ) -> PositionLists:
        """See :meth:`Candidates.choose`."""
        return super().choose(choose, scores, lse, always, **self.scored(), **given)

    def positions(self, always: Always) -> tuple[Tensor, Tensor]:
        """See :meth:`Candidates.positions`."""
        within = torch.arange(GRANULE, device=self.lists.device, dtype=torch.int32)
        places = (self.lists[..., None] * GRANULE + within).flatten(2)
        place = torch.arange(places.shape[-1], device=places.device)
        listed = place < GRANULE * self.counts[..., None]
        first = (listed & (places < always.sinks)).sum(-1, dtype=torch.int32)
        before = (listed & (places < (always.lengths - always.recent)[:, None, None])).sum(-1, dtype=torch.int32)
        # They ascend: those that are read in any case are the first and the last ones.
        index = (place + first[..., None]).clamp_max(places.shape[-1] - 1)
        return places.gather(2, index), (before - first).clamp_min(0)


class AllPages(Candidates):
    """Pages of 16 tokens where there is room for all of them, so that there is nothing to choose. Scores have a column
    for each position.

    Args:
        lengths: int32 ``[B]``: tokens of each row.
        heads: KV heads.
        pages: of a row, at most.
    """

    def __init__(self, lengths: Tensor, heads: int, pages: int) -> None:
        self._lengths, self._heads, self._pages = lengths, heads, pages
        self.most = pages * GRANULE

    def positions(self, always: Always) -> tuple[Tensor, Tensor]:
        """See :meth:`Candidates.positions`."""
        page = torch.arange(self._pages, dtype=torch.int32, device=self._lengths.device)
        counts = (self._lengths + (GRANULE - 1)) // GRANULE
        lists = page.repeat(len(counts), self._heads, 1)
        return Pages(lists, counts[:, None].repeat(1, self._heads)).positions(always)


class Tokens(Candidates):
    """Single tokens, which are none of those that are read in any case. Scores have a column for each of the first
    tokens, then for each candidate, then for each of the last tokens: they count among the weight that is shared out.
    What stands beside a candidate is no neighbour of it.

    Args:
        lists: int32 ``[B, Hkv, most]``, ascending positions.
        counts: int32 ``[B, Hkv]``, entries of each list.
        always: the same that are left out of them; ``recent`` is a number.
    """

    pooled = 1

    def __init__(self, lists: Tensor, counts: Tensor, always: Always) -> None:
        self.lists, self.counts = lists, counts
        self.most = lists.shape[-1]
        assert isinstance(always.recent, int)
        self._first, self._last = always.sinks, always.recent
        lengths = always.lengths[:, None]
        device = lengths.device
        first = torch.arange(self._first, device=device, dtype=torch.int32).expand(len(lengths), -1)
        last = torch.arange(-self._last, 0, device=device, dtype=torch.int32) + lengths
        # A short row has no token twice.
        first, last = first.where(first < lengths, -1), last.where(last >= self._first, -1)
        between = lists.where(torch.arange(self.most, device=device) < counts[..., None], -1)
        between = torch.nn.functional.pad(between, (0, -(self._first + self.most + self._last) % ROW), value=-1)
        wide = (-1, lists.shape[1], -1)
        self._columns = torch.cat([first[:, None].expand(wide), between, last[:, None].expand(wide)], dim=2)

    def scored(self) -> dict[str, Any]:
        """See :meth:`Candidates.scored`."""
        columns = self._columns
        counts = columns.new_full(columns.shape[:2], columns.shape[2])
        return {"page_lists": columns, "page_counts": counts, "granule": 1}

    def choose(
        self, choose: Callable[..., PositionLists], scores: Tensor, lse: Tensor, always: Always, **given: Any
    ) -> PositionLists:
        """See :meth:`Candidates.choose`."""
        columns = self._columns
        of_columns = Always(always.lengths.new_full(always.lengths.shape, columns.shape[2]), self._first, self._last)
        given.pop("into", None)  # columns, which are not what is wanted
        found = super().choose(choose, scores, lse, of_columns, **given)
        # What lies behind a count may be anything.
        inside = found.lists.clamp(0, columns.shape[2] - 1).long()
        return found._replace(lists=columns.gather(2, inside))

    def positions(self, always: Always) -> tuple[Tensor, Tensor]:
        """See :meth:`Candidates.positions`."""
        return self.lists, self.counts
