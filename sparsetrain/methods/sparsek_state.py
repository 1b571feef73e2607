"""What a SparseK layer keeps of the past in generation: ``sinks + topk + window`` keys, however long the text.

A head has one row of slots: first the sinks, then the selected tokens in any order, then the window as a ring (the
token at position p lies in slot ``p % window``). Keys keep the rotary position they came with. Which slot holds what is
told by ``positions`` alone, so that a step is the same few tensor operations for every row and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from sparsetrain_kernels.sparsek import sparsek_threshold
from torch import Tensor

from sparsetrain.methods.base import DecodeState
from sparsetrain.methods.sparsek_scorer import Moments

EMPTY = -1
"""Position of a slot that holds nothing, and of a score whose key is gone."""


class Sequence(NamedTuple):
    """Tokens in the order in which they compete: read as one document, they lead to the selection of the whole text."""

    key: Tensor
    """``[B, H, M, D]``; zeros where only the score is left."""
    value: Tensor
    """``[B, H, M, D]``."""
    scores: Tensor
    """``[B, Hs, M]``."""
    positions: Tensor
    """Position in the text, int64 ``[B, Hs, M]``."""


@dataclass
class Slots:
    """The tensors of a state. The first dimension is the batch."""

    keys: Tensor
    """``[B, H, sinks + topk + window, D]``."""
    values: Tensor
    """``[B, H, sinks + topk + window, D]``."""
    positions: Tensor
    """int64 ``[B, Hs, sinks + topk + window]``."""
    scores: Tensor
    """``[B, Hs, sinks + topk + window]``, -inf in empty slots."""
    buffer: Tensor
    """The largest scores that have competed, ``[B, Hs, score_buffer]``, -inf where there were fewer."""
    total: Tensor
    """Sum of all scores before normalisation, fp64 ``[B, Hs]``."""
    squares: Tensor
    """Sum of their squares, fp64 ``[B, Hs]``."""
    length: Tensor
    """Tokens read, int64 ``[B]``."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """The slots with ``change`` applied to each tensor."""
        return Slots(*(change(getattr(self, field.name)) for field in fields(self)))


class SparseKState(DecodeState):
    """The slots of one layer, for a batch of texts that may differ in length.

    The threshold depends on every score above it, also of tokens that have lost their place. So scores are kept apart
    from the slots: of each head the ``score_buffer`` largest that have competed. Where more than that lie above the
    threshold, the smallest are forgotten, and the threshold comes out too low, and gates too large, by less than
    ``topk / score_buffer``, a quarter by default. (In that case the gates of all scores kept add up to ``topk``, so
    the smallest of them is at most ``topk / score_buffer`` above the threshold found; the true threshold lies between
    the two.) As soon as the threshold has passed the largest forgotten score, it is exact again.

    Args:
        topk, window, sinks: as in :class:`~sparsetrain.methods.sparsek.SparseKConfig`.
        score_buffer: scores kept of each head.
        score_heads: selections in the layer: one for each KV head, or 1 that they share.
    """

    def __init__(self, *, topk: int, window: int, sinks: int, score_buffer: int, score_heads: int) -> None:
        self.topk, self.window, self.sinks = topk, window, sinks
        self.score_buffer, self.score_heads = score_buffer, score_heads
        self.lengths: list[int] = []
        """Tokens each row has read: ``slots.length``, known on the host."""
        self.slots: Slots | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first tokens."""
        return len(self.lengths)

    @property
    def started(self) -> bool:
        """Every row has read a token, so that the next one can be read by :meth:`step`."""
        return bool(self.lengths) and min(self.lengths) > 0

    def reset(self) -> None:
        """Forget everything."""
        self.lengths, self.slots = [], None

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may come more than once."""
        if self.slots is not None:
            self.lengths = [self.lengths[row] for row in rows.tolist()]
            self.slots = self.slots.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def start(self, key: Tensor) -> Slots:
        """The slots, made on first use for a batch like ``key`` ``[B, H, N, D]``."""
        if self.slots is None:
            batch, heads, _, width = key.shape
            slots, selections = self.sinks + self.topk + self.window, (batch, self.score_heads)
            wide, empty = torch.promote_types(key.dtype, torch.float32), key.detach().new_full
            self.lengths = [0] * batch
            self.slots = Slots(
                keys=empty((batch, heads, slots, width), 0.0),
                values=empty((batch, heads, slots, width), 0.0),
                positions=empty((*selections, slots), EMPTY, dtype=torch.int64),
                scores=empty((*selections, slots), -torch.inf, dtype=wide),
                buffer=empty((*selections, self.score_buffer), -torch.inf, dtype=wide),
                total=empty(selections, 0.0, dtype=torch.float64),
                squares=empty(selections, 0.0, dtype=torch.float64),
                length=empty((batch,), 0, dtype=torch.int64),
            )
        return self.slots

    def moments(self, rows: list[int] | slice) -> Moments:
        """What normalisation needs to know of the tokens these rows have read."""
        slots = self._slots
        return Moments(slots.total[rows], slots.squares[rows])

    def threshold(self) -> Tensor:
        """The threshold of every row and head, ``[B, Hs]``; -inf where no more than ``topk`` tokens have competed."""
        buffer = self._slots.buffer
        return sparsek_threshold(buffer.double(), self.topk, mask=buffer > -torch.inf).to(buffer.dtype)

    @torch.no_grad()
    def step(self, key: Tensor, value: Tensor, scores: Tensor, moments: Moments | None) -> None:
        """Take in one token a row.

        The token that leaves the window competes: it takes an empty place if there is one, else that of the smallest
        score if its own is not smaller (of equal scores the older goes), else it is gone. Its ring slot goes to the new
        token.

        Args:
            key, value: ``[B, H, 1, D]``.
            scores: ``[B, Hs, 1]``.
            moments: after this token; None without normalisation.
        """
        slots, places = self._slots, slice(self.sinks, self.sinks + self.topk)
        position = slots.length
        ring = self.sinks + self.topk + position % self.window
        leaver = ring[:, None, None].expand_as(scores)
        competes = (position - self.window >= self.sinks)[:, None, None]

        score = slots.scores.gather(2, leaver)
        lowest = slots.scores[:, :, places].amin(2, keepdim=True)
        tied = slots.scores[:, :, places] <= lowest
        oldest = slots.positions[:, :, places].masked_fill(~tied, torch.iinfo(torch.int64).max)
        loser = oldest.argmin(2, keepdim=True) + self.sinks
        wins = competes & (score >= lowest)
        for tensor in (slots.keys, slots.values, slots.scores, slots.positions):
            _move(tensor, leaver, loser, wins)

        least, at = slots.buffer.min(2, keepdim=True)
        slots.buffer.scatter_(2, at, torch.where(competes & (score > least), score, least))

        target = torch.where(position < self.sinks, position, ring)[:, None, None].expand_as(scores)
        slots.scores.scatter_(2, target, scores)
        slots.positions.scatter_(2, target, position[:, None, None].expand_as(target))
        for tensor, new in ((slots.keys, key), (slots.values, value)):
            tensor.scatter_(2, _wide(target, new), new)
        if moments is not None:
            slots.total, slots.squares = moments
        slots.length = position + 1
        self.lengths = [length + 1 for length in self.lengths]

    def attend(self, query: Tensor, *, gate: str, scale: float | None) -> Tensor:
        """Attention of the last token of every row to what the slots hold, itself included.

        Args:
            query: ``[B, Hq, 1, D]``.
            gate: ``value``, ``log`` or ``straight``.
            scale: factor on the logits; None means ``D ** -0.5``.

        Returns:
            ``[B, Hq, 1, D]`` in the query's dtype, accumulated in fp32.
        """
        slots, (batch, query_heads, _, width) = self._slots, query.shape
        heads, wide = slots.keys.shape[1], slots.scores.dtype
        grouped = query.reshape(batch, heads, query_heads // heads, width).to(wide)
        logits = grouped @ slots.keys.to(wide).transpose(2, 3) * (width**-0.5 if scale is None else scale)
        logits = logits.masked_fill(slots.positions[:, :, None] == EMPTY, -torch.inf)
        gates = self._gates()[:, :, None]
        if gate == "log":
            logits = logits + gates.log()
        weights = logits.softmax(dim=-1)
        if gate == "value":
            weights = weights * gates
        return (weights @ slots.values.to(wide)).reshape(query.shape).to(query.dtype)

    def _gates(self) -> Tensor:
        """``clip(score - threshold, 0, 1)`` of the selected tokens, 1 in the other slots: ``[B, Hs, slots]``."""
        slots, selected = self._slots, slice(self.sinks, self.sinks + self.topk)
        held = slots.positions[:, :, selected] != EMPTY
        above = slots.scores[:, :, selected].masked_fill(~held, 0.0) - self.threshold()[..., None]
        gates = torch.ones_like(slots.scores)
        gates[:, :, selected] = above.clamp(0.0, 1.0)
        return gates

    def sequence(self, rows: list[int] | slice, length: int, new: Sequence) -> Sequence:
        """What rows that have read ``length`` tokens hold, and ``new`` tokens after it.

        First the sinks, then scores whose keys are gone, then the selected tokens, then the window. Scores without keys
        stand before the selected ones, to which they have lost once and so will again, ties included.
        """
        if length == 0:
            return new
        slots, window_start = self._slots, max(self.sinks, length - self.window)
        sinks, competed = min(length, self.sinks), max(0, length - self.window - self.sinks)
        keys, values, scores, positions = (
            tensor[rows] for tensor in (slots.keys, slots.values, slots.scores, slots.positions)
        )
        selected = slice(self.sinks, self.sinks + min(competed, self.topk))
        by_age = positions[:, :, selected].argsort(2) + self.sinks
        ring = torch.arange(window_start, max(length, window_start), device=keys.device) % self.window
        ring = (ring + self.sinks + self.topk).expand(*scores.shape[:2], -1)
        sink = torch.arange(sinks, device=keys.device).expand(*scores.shape[:2], -1)
        order = torch.cat([sink, by_age, ring], dim=2)

        lost = slots.buffer[rows].sort(2, descending=True).values
        lost = lost[:, :, self.topk : min(competed, self.score_buffer)]
        gone = keys.new_zeros(*keys.shape[:2], lost.shape[2], keys.shape[3])
        held = Sequence(*(tensor.gather(2, _wide(order, tensor)) for tensor in (keys, values, scores, positions)))
        fillers = Sequence(gone, gone, lost, torch.full_like(lost, EMPTY, dtype=torch.int64))
        return Sequence(
            *(
                torch.cat([kept[:, :, :sinks], filler, kept[:, :, sinks:], fresh], dim=2)
                for kept, filler, fresh in zip(held, fillers, new, strict=True)
            )
        )

    @torch.no_grad()
    def fill(self, rows: list[int] | slice, sequence: Sequence, length: int, moments: Moments | None) -> None:
        """Keep of a sequence what these rows, now ``length`` tokens long, still need.

        Args:
            moments: after the last token; None without normalisation.
        """
        slots, members = self._slots, sequence.scores.shape[2]
        sinks, window_start = min(length, self.sinks), max(self.sinks, length - self.window)
        in_window = max(0, length - window_start)
        competing = slice(sinks, members - in_window)
        # Newest first, so that a stable sort puts the newer of two equal scores before the older.
        newest_first = sequence.scores[:, :, competing].flip(2)
        ranked, order = newest_first.sort(dim=2, descending=True, stable=True)
        chosen = members - in_window - 1 - order[:, :, : self.topk]
        window = torch.arange(members - in_window, members, device=chosen.device).expand(*chosen.shape[:2], -1)
        sink = torch.arange(sinks, device=chosen.device).expand(*chosen.shape[:2], -1)
        source = torch.cat([sink, chosen, window], dim=2)
        ring = torch.arange(window_start, window_start + in_window, device=chosen.device) % self.window
        place = torch.arange(self.sinks, self.sinks + chosen.shape[2], device=chosen.device)
        target = torch.cat([sink[0, 0], place, self.sinks + self.topk + ring])

        for tensor, content in (
            (slots.keys, sequence.key),
            (slots.values, sequence.value),
            (slots.scores, sequence.scores),
            (slots.positions, sequence.positions),
        ):
            kept = tensor[rows].index_copy(2, target, content.gather(2, _wide(source, content)))
            tensor[rows] = kept
        ranked = ranked[:, :, : self.score_buffer]
        slots.buffer[rows, :, : ranked.shape[2]] = ranked
        if moments is not None:
            slots.total[rows], slots.squares[rows] = moments
        slots.length[rows] = length
        for row in range(len(self.lengths))[rows] if isinstance(rows, slice) else rows:
            self.lengths[row] = length

    @property
    def _slots(self) -> Slots:
        assert self.slots is not None, "a state is started before it is read"
        return self.slots


def _wide(index: Tensor, tensor: Tensor) -> Tensor:
    """An index over slots ``[B, Hs, M]`` as it gathers from ``tensor``, ``[B, Hs, slots]`` or ``[B, H, slots, D]``."""
    if tensor.dim() == 3:
        return index
    batch, heads, _, width = tensor.shape
    return index[..., None].expand(batch, heads if index.shape[1] == 1 else -1, -1, width)


def _move(tensor: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> None:
    """Copy slot ``source`` to slot ``target`` where ``wanted``; all ``[B, Hs, 1]``."""
    source, target = _wide(source, tensor), _wide(target, tensor)
    wanted = wanted if tensor.dim() == 3 else wanted[..., None]
    tensor.scatter_(2, target, torch.where(wanted, tensor.gather(2, source), tensor.gather(2, target)))
