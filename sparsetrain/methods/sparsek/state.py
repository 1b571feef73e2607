"""The memory of a SparseK layer in generation: ``sinks + topk + window`` keys, however long the text.

A head has one row of slots: first the sinks, then the selected tokens in any order, then the window as a ring (the
token at position p lies in slot ``p % window``). Keys keep the rotary position they came with. Which slot holds what is
told by ``positions`` alone, so that a step (``sparsetrain_kernels.sparsek_decode``) is the same for every row and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from sparsetrain_kernels.score_placement import Moments
from sparsetrain_kernels.sparsek_decode import (
    EMPTY,
    SparseKSlots,
    buffer_threshold,
    sparsek_decode_attention,
    sparsek_decode_update,
)
from torch import Tensor

__all__ = ["EMPTY", "Sequence", "Slots", "SparseKState"]


class Sequence(NamedTuple):
    """Tokens in the order in which they compete: read as one document, they lead to the selection of the whole text."""

    key: Tensor
    """``[B, H, M, D]``; zeros where only the score is left."""
    value: Tensor
    """``[B, H, M, D]``."""
    scores: Tensor
    """``[B, Hs, M]``."""
    positions: Tensor
    """Position in the text, int64 ``[B, Hs, M]``; ``EMPTY`` where only the score is left."""


@dataclass
class Slots:
    """The tensors of a state. The first dimension is the batch. A step changes them in place."""

    keys: Tensor
    """``[B, H, sinks + topk + window, D]``; this and the next six are what
    :class:`~sparsetrain_kernels.sparsek_decode.SparseKSlots` says."""
    values: Tensor
    positions: Tensor
    scores: Tensor
    buffer: Tensor
    threshold: Tensor
    read: Tensor
    total: Tensor
    """Sum of all scores before normalisation, fp64 ``[B, Hs]``."""
    squares: Tensor
    """Sum of their squares, fp64 ``[B, Hs]``."""

    @property
    def length(self) -> Tensor:
        """Tokens read, int64 ``[B]``."""
        return self.read[:, 0]

    @property
    def held(self) -> SparseKSlots:
        """The tensors that a step of decoding reads and changes."""
        return SparseKSlots(*(getattr(self, name) for name in SparseKSlots._fields))

    def copy_(self, other: Slots) -> None:
        """Take the values of other slots."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def map(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """The slots with ``change`` applied to each tensor."""
        return Slots(*(change(getattr(self, field.name)) for field in fields(self)))


class SparseKState:
    """The slots of one layer, for a batch of texts that may differ in length.

    The threshold depends on every score above it, also of tokens that have lost their place. So scores are kept apart
    from the slots: of each head the ``score_buffer`` largest that have competed. Where more than that lie above the
    threshold, the smallest are forgotten, and the threshold comes out too low, and gates too large, by less than
    ``topk / score_buffer``, a quarter by default. (In that case the gates of all scores kept add up to ``topk``, so
    the smallest of them is at most ``topk / score_buffer`` above the threshold found; the true threshold lies between
    the two.) As soon as the threshold has passed the largest forgotten score, it is exact again.

    Args:
        topk, window, sinks: as in :class:`~sparsetrain.methods.sparsek.method.SparseKConfig`.
        score_buffer: scores kept of each head.
        score_heads: selections in the layer: one for each KV head, or 1 that they share.
    """

    def __init__(self, *, topk: int, window: int, sinks: int, score_buffer: int, score_heads: int) -> None:
        self.topk, self.window, self.sinks = topk, window, sinks
        self.score_buffer, self.score_heads = score_buffer, score_heads
        self.slots: Slots | None = None
        self.started = False
        """Every row has read a token, so that the next one can be read by :meth:`step`."""
        self._spare: Slots | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first tokens."""
        return 0 if self.slots is None else len(self.slots.read)

    @property
    def lengths(self) -> list[int]:
        """Tokens each row has read: ``slots.length``, read on the host."""
        return [] if self.slots is None else self.slots.length.tolist()

    def reset(self) -> None:
        """Forget everything; another text of the same shapes is kept in the same tensors."""
        if self.slots is not None:
            self._spare, self.slots, self.started = self.slots, None, False

    def select_rows(self, rows: Tensor) -> None:
        """Select rows of the batch, int64 ``[rows]``, in this order; a row may be repeated. Where their number stays,
        so do the tensors."""
        if self.slots is not None:
            chosen = self.slots.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
            if len(rows) == self.rows:
                self.slots.copy_(chosen)
            else:
                self.slots = chosen

    def start(self, key: Tensor) -> Slots:
        """The slots, made on first use for a batch like ``key`` ``[B, H, N, D]``."""
        if self.slots is None:
            batch, heads, _, width = key.shape
            slots, selections = self.sinks + self.topk + self.window, (batch, self.score_heads)
            wide, empty = torch.promote_types(key.dtype, torch.float32), key.detach().new_full
            self.slots = Slots(
                keys=empty((batch, heads, slots, width), 0.0),
                values=empty((batch, heads, slots, width), 0.0),
                positions=empty((*selections, slots), EMPTY, dtype=torch.int64),
                scores=empty((*selections, slots), -torch.inf, dtype=wide),
                buffer=empty((*selections, self.score_buffer), -torch.inf, dtype=wide),
                threshold=empty(selections, -torch.inf, dtype=wide),
                read=empty(selections, 0, dtype=torch.int64),
                total=empty(selections, 0.0, dtype=torch.float64),
                squares=empty(selections, 0.0, dtype=torch.float64),
            )
            spare, made = self._spare, self.slots
            if spare is not None and _shapes(spare) == _shapes(made):
                spare.copy_(made)
                self.slots = spare
            self._spare = None
        return self.slots

    def moments(self, rows: list[int] | slice) -> Moments:
        """The statistics of the tokens that these rows have read, for normalisation."""
        slots = self.started_slots
        return Moments(slots.total[rows], slots.squares[rows])

    def threshold(self) -> Tensor:
        """The threshold of every row and head, ``[B, Hs]``; -inf where no more than ``topk`` tokens have competed."""
        return self.started_slots.threshold

    @torch.no_grad()
    def step(self, key: Tensor, value: Tensor, scores: Tensor, moments: Moments | None) -> None:
        """Take in one token a row, as ``sparsek_decode_update`` says.

        The tensors of the slots stay what they are and change in place, and nothing changes on the host, so that a
        step can be compiled, and a CUDA graph can hold it.

        Args:
            key, value: ``[B, H, 1, D]``.
            scores: ``[B, Hs, 1]``.
            moments: after this token; None without normalisation.
        """
        slots = self.started_slots
        sparsek_decode_update(key, value, scores, slots.held, topk=self.topk, window=self.window, sinks=self.sinks)
        if moments is not None:
            torch._foreach_copy_([slots.total, slots.squares], list(moments))

    @torch.no_grad()
    def attend(self, query: Tensor, *, gate: str, scale: float | None, kept: Tensor | None = None) -> Tensor:
        """Attention of the last token of every row to what the slots hold, itself included.

        Args:
            query: ``[B, Hq, 1, D]``.
            gate: ``value``, ``log`` or ``straight``.
            scale: factor on the logits; None means ``D ** -0.5``.
            kept: bool ``[B, H, slots]``, the slots that are read of those that hold a token; None means all of these.

        Returns:
            ``[B, Hq, 1, D]`` in the query's dtype, accumulated in fp32.
        """
        shape: dict[str, Any] = {"topk": self.topk, "window": self.window, "sinks": self.sinks}
        return sparsek_decode_attention(query, self.started_slots.held, **shape, gate=gate, scale=scale, kept=kept)

    def sequence(self, rows: list[int] | slice, length: int, new: Sequence) -> Sequence:
        """The slots of rows that have read ``length`` tokens, and ``new`` tokens after them.

        First the sinks, then scores whose keys are gone, then the selected tokens, then the window. Scores without keys
        stand before the selected ones, to which they have lost once and so will again, ties included.
        """
        if length == 0:
            return new
        slots, window_start = self.started_slots, max(self.sinks, length - self.window)
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
        slots, members = self.started_slots, sequence.scores.shape[2]
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
        slots.threshold[rows] = buffer_threshold(slots.buffer[rows], self.topk)
        if moments is not None:
            slots.total[rows], slots.squares[rows] = moments
        slots.read[rows] = length
        self.started = min(self.lengths) > 0

    @property
    def started_slots(self) -> Slots:
        """The slots, once there are any."""
        assert self.slots is not None, "a state is started before it is read"
        return self.slots


def _shapes(slots: Slots) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    tensors = [getattr(slots, field.name) for field in fields(slots)]
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def _wide(index: Tensor, tensor: Tensor) -> Tensor:
    """An index over slots ``[B, Hs, M]`` as it gathers from ``tensor``, ``[B, Hs, slots]`` or ``[B, H, slots, D]``."""
    if tensor.dim() == 3:
        return index
    batch, heads, _, width = tensor.shape
    return index[..., None].expand(batch, heads if index.shape[1] == 1 else -1, -1, width)
