"""The keys that a step considers: all of them, or those that a cheaper look at them promises the largest logits.

A selector keeps what it looks at beside the pages of a memory, by page, so that it grows, moves and is written with
them. Its candidates are lists of positions in the cache; keys are never copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from sparsetrain_kernels import page_scores
from sparsetrain_kernels.key_mirror import PageBounds
from torch import Tensor

from sparsetrain.generation.settings import Decode

GRANULE = 16
"""Tokens of a page of Quest."""


class Places(NamedTuple):
    """Where the keys of each row are, and what a selector keeps beside them."""

    lengths: Tensor
    """int32 ``[B]``: tokens of each row."""
    block_table: Tensor
    """int32 ``[B, pages]``: the page of each block of a row."""
    max_length: int
    """Tokens that a row's pages have room for."""
    beside: dict[str, Tensor]
    """Further tensors by page."""

    @property
    def arguments(self) -> dict[str, Any]:
        """As operations take them."""
        return {"lengths": self.lengths, "block_table": self.block_table, "max_length": self.max_length}


class Candidates(NamedTuple):
    """What a step considers; all keys where there are no lists."""

    page_lists: Tensor | None = None
    """int32 ``[B, Hkv, P]``: pages of 16 tokens, ascending."""
    page_counts: Tensor | None = None
    """int32 ``[B, Hkv]``: entries of each list."""

    @property
    def all_keys(self) -> bool:
        """Every key is a candidate."""
        return self.page_lists is None

    @property
    def arguments(self) -> dict[str, Any]:
        """As operations take them."""
        return self._asdict()

    def positions(self, room: int, *, lengths: Tensor, sinks: int, recent: int) -> tuple[Tensor, Tensor]:
        """All their tokens but the first ``sinks`` and the last ``recent`` ones, which are read in any case.

        Returns:
            Ascending positions, int32 ``[B, Hkv, 16 * P]``, and how many of them there are, int32 ``[B, Hkv]``.
        """
        assert self.page_lists is not None
        assert self.page_counts is not None
        within = torch.arange(GRANULE, device=lengths.device, dtype=torch.int32)
        places = (self.page_lists[..., None] * GRANULE + within).flatten(2)
        listed = torch.arange(places.shape[-1], device=places.device) < GRANULE * self.page_counts[..., None]
        kept = listed & (places >= sinks) & (places < (lengths - recent)[:, None, None])
        return torch.where(kept, places, room).sort().values, kept.sum(-1, dtype=torch.int32)


class Selector(ABC):
    """How the candidates of a step are found."""

    def make_beside(self, key: Tensor, pages: int, block: int) -> dict[str, Tensor]:
        """What is kept beside ``pages`` pages of ``block`` keys like ``[B, Hkv, N, D]``."""
        return {}

    def written(self, beside: dict[str, Tensor]) -> dict[str, Any]:
        """What :func:`~sparsetrain_kernels.append_tokens` writes beside the keys, as its arguments, of ``beside`` by
        page, ``[pages, ...]``."""
        return {}

    @abstractmethod
    def candidates(self, query: Tensor, places: Places, scale: float | None) -> Candidates:
        """Of a step with ``query [B, Hq, 1, D]`` and this factor on its logits."""


class EveryKey(Selector):
    """All keys."""

    def candidates(self, query: Tensor, places: Places, scale: float | None) -> Candidates:
        """See :meth:`Selector.candidates`."""
        return Candidates()


class QuestPages(Selector):
    """Pages of 16 tokens by the minima and maxima of their keys (Quest, 2406.10774).

    Args:
        tokens: that are passed on.
    """

    def __init__(self, tokens: int) -> None:
        self._pages = -(-tokens // GRANULE)

    def make_beside(self, key: Tensor, pages: int, block: int) -> dict[str, Tensor]:
        """See :meth:`Selector.make_beside`."""
        return {"bounds": key.new_zeros(pages, key.shape[1], block // GRANULE, 2, key.shape[3])}

    def written(self, beside: dict[str, Tensor]) -> dict[str, Any]:
        """See :meth:`Selector.written`."""
        return {"bounds": PageBounds(beside["bounds"])}

    def candidates(self, query: Tensor, places: Places, scale: float | None) -> Candidates:
        """See :meth:`Selector.candidates`."""
        bounds = page_scores(query, PageBounds(places.beside["bounds"]), scale=scale, **places.arguments)
        best = bounds.topk(min(self._pages, bounds.shape[-1]), sorted=False)
        real = best.values > float("-inf")
        pages = torch.where(real, best.indices, bounds.shape[-1]).sort().values.int()
        return Candidates(pages, real.sum(-1, dtype=torch.int32))


def make_selector(decode: Decode) -> Selector:
    """The selector that a section asks for."""
    return QuestPages(decode.candidate_tokens) if decode.select == "quest" else EveryKey()
