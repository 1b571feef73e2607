"""The memory of patterns in which KV heads read different distances: each head keeps the pages that it reads itself.

Heads that read alike share pages (:mod:`~sparsetrain.generation.pages`). A head whose farthest block lies 8 back keeps
a ring of 9, whatever the head beside it keeps. A step is one for each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.generation.pages import PagedMemory
from sparsetrain.methods.memory import Memory
from sparsetrain.methods.static import StaticMethod
from sparsetrain.patterns import Pattern


class PagesByHead(Memory):
    """Keys and values in pages of each KV head.

    Args:
        patterns: of each KV head, without lists by head.
        room: ``max_length``, ``rollback`` and ``budget`` of :class:`~sparsetrain.generation.pages.PagedMemory`. The
            budget holds for every head.
    """

    paged = True

    def __init__(self, patterns: Sequence[Pattern], **room: Any) -> None:
        grouped = [(pattern, len(list(heads))) for pattern, heads in groupby(patterns)]
        self.heads = [heads for _, heads in grouped]
        """KV heads of each part."""
        self.parts = [PagedMemory(pattern, StaticMethod(pattern).attend, **room) for pattern, _ in grouped]
        """The memories of neighbouring heads that read alike."""
        self.static = self.parts[0].static

    @property
    def rows(self) -> int:
        """See :attr:`Memory.rows`."""
        return self.parts[0].rows

    @property
    def started(self) -> bool:
        """See :attr:`Memory.started`."""
        return self.parts[0].started

    @property
    def longest(self) -> int:
        """See :attr:`Memory.longest`."""
        return self.parts[0].longest

    @longest.setter
    def longest(self, tokens: int) -> None:
        for part in self.parts:
            part.longest = tokens

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, starts: list[int] | None, **options: Any
    ) -> Tensor:
        """See :meth:`Memory.attend`."""
        group = query.shape[1] // key.shape[1]
        keys, values = key.split(self.heads, dim=1), value.split(self.heads, dim=1)
        queries = query.split([heads * group for heads in self.heads], dim=1)
        logits = options.pop("sink_logits", None)
        sinks: Sequence[Tensor | None] = [None] * len(self.parts)
        if logits is not None:
            sinks = logits.split([heads * group for heads in self.heads])
        each = zip(self.parts, queries, keys, values, sinks, strict=True)
        outs = [part.attend(layer, q, k, v, starts=starts, sink_logits=sink, **options) for part, q, k, v, sink in each]
        return torch.cat(outs, dim=1)

    def rollback(self, tokens: int) -> None:
        """See :meth:`Memory.rollback`.

        Raises:
            ModelError: a page that is needed again has been written over.
        """
        if tokens and self.rows:
            for part in self.parts:
                part.check_rollback(tokens)
        for part in self.parts:
            part.rollback(tokens)

    def begin_round(self) -> None:
        """Nothing: the last tokens can always be taken back."""

    def offload(self) -> None:
        """Raises :class:`ModelError`: pages stay where the layer is."""
        self.parts[0].offload()

    def reset(self) -> None:
        """See :meth:`Memory.reset`."""
        for part in self.parts:
            part.reset()

    def select_rows(self, rows: Tensor) -> None:
        """See :meth:`Memory.select_rows`, int64 ``[rows]``."""
        for part in self.parts:
            part.select_rows(rows)

    def nbytes(self) -> int:
        """See :meth:`Memory.nbytes`."""
        return sum(part.nbytes() for part in self.parts)

    def fixed(self) -> tuple[Any, ...]:
        """See :meth:`Memory.fixed`."""
        return tuple(part.fixed() for part in self.parts)

    def check_prompts(self, lengths: Sequence[int]) -> None:
        """See :meth:`Memory.check_prompts`."""
        for part in self.parts:
            part.check_prompts(lengths)
