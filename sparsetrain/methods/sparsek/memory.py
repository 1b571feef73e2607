"""A SparseK layer in generation: one token at a time from the slots, several by the operator of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparsetrain_kernels.score_placement import DocumentPositions, Moments, document_positions
from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.methods.memory import Memory
from sparsetrain.methods.sparsek.options import check_options
from sparsetrain.methods.sparsek.state import Sequence, SparseKState

Score = Callable[..., tuple[Tensor, Moments | None]]
"""``(layer, query, linear, gain, places, moments)``: the scores that compete, and the moments after them."""

SelectAndAttend = Callable[..., Tensor]
"""``(layer, query, key, value, scores, topk, cu_seqlens, scale)``: the operator of training."""


class SparseKMemory(Memory):
    """The slots of a layer, and how it attends with them.

    Args:
        state: empty slots.
        gate: as in :class:`~sparsetrain.methods.sparsek.method.SparseKConfig`.
    """

    def __init__(self, state: SparseKState, gate: str, score: Score, select_and_attend: SelectAndAttend) -> None:
        self.state, self.gate = state, gate
        self._score, self._select_and_attend = score, select_and_attend

    @property
    def rows(self) -> int:
        """See :attr:`Memory.rows`."""
        return self.state.rows

    @property
    def started(self) -> bool:
        """See :attr:`Memory.started`."""
        return self.state.started

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        starts: list[int] | None,
        sparsek_scores: Tensor | None = None,
        sparsek_gain: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """See :meth:`Memory.attend`."""
        check_options(options)
        state, scale = self.state, options.get("scale")
        slots = state.start(key)
        if query.shape[2] == 1 and state.started:
            places = DocumentPositions(slots.length[:, None], torch.zeros_like(slots.length[:, None]))
            before = state.moments(slice(None))
            scores, after = self._score(layer, query, sparsek_scores, sparsek_gain, places, before)
            state.step(key, value, scores, after)
            return state.attend(query, gate=self.gate, scale=scale)

        out = torch.zeros_like(query)
        for (start, length), rows in _alike(starts, state.lengths).items():
            tokens = query.shape[2] - start
            if tokens <= 0:
                continue
            q, k, v = (tensor[rows][:, :, start:] for tensor in (query, key, value))
            linear, gain = (
                None if tensor is None else tensor[rows][:, :, start:] for tensor in (sparsek_scores, sparsek_gain)
            )
            places = document_positions(tokens, None, query.device)
            places = DocumentPositions(places.position + length, places.first)
            scores, after = self._score(layer, q, linear, gain, places, state.moments(rows))
            sequence = state.sequence(rows, length, Sequence(k, v, scores, places.position.expand_as(scores)))
            # What the slots hold asks nothing, but the operator wants a query for every key.
            asked = torch.cat([q.new_zeros(*q.shape[:2], sequence.key.shape[2] - tokens, q.shape[3]), q], dim=2)
            # The slots have room for the config's topk, whatever training is at.
            answers = self._select_and_attend(
                layer, asked, sequence.key, sequence.value, sequence.scores, state.topk, None, scale
            )
            out[rows, :, start:] = answers[:, :, -tokens:]
            state.fill(rows, sequence, length + tokens, after)
        return out

    def rollback(self, tokens: int) -> None:
        """Raises :class:`ModelError`: a token that was evicted cannot come back."""
        raise ModelError(
            "the cache of this attention method forgets for good, so it cannot take back tokens (assisted generation); "
            "generate without an assistant model"
        )

    def begin_round(self) -> None:
        """Nothing: see :meth:`rollback`."""

    def nbytes(self) -> int:
        """See :meth:`Memory.nbytes`."""
        return 0 if self.state.slots is None else sum(tensor.nbytes for tensor in vars(self.state.slots).values())

    def offload(self) -> None:
        """Raises :class:`ModelError`: there is nothing to gain."""
        raise ModelError("this cache is small and stays where the layer is; generate without an offloaded cache")

    def reset(self) -> None:
        """See :meth:`Memory.reset`."""
        self.state.reset()

    def select_rows(self, rows: Tensor) -> None:
        """See :meth:`Memory.select_rows`."""
        self.state.select_rows(rows)


def _alike(starts: list[int] | None, lengths: list[int]) -> dict[tuple[int, int], list[int] | slice]:
    """The rows of a batch by their padding and by how many tokens they have read; a slice where all are alike."""
    pairs = list(zip(starts or [0] * len(lengths), lengths, strict=True))
    if len(set(pairs)) == 1:
        return {pairs[0]: slice(None)}
    return {pair: [row for row, other in enumerate(pairs) if other == pair] for pair in dict.fromkeys(pairs)}
