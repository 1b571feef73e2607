"""Choices of keys that several steps use: made anew every few tokens, or where queries have changed (RefreshKV).

The steps of a text are divided into stretches of ``every`` tokens. A stretch has one place for its choice, made at its
first step; a row that is not due there takes that of the stretch before. The last few stretches are kept, as many as
tokens may be taken back, and the place of a stretch follows from the number of the step alone: taking tokens back only
changes that number.

The number is the host's where steps run on the host, which then knows when nothing is due. Where steps are compiled or
captured, it is a tensor: a step is the same for every number, and operations are told who is due. They write the lists
of those in place, and return at once for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sparsetrain_kernels.top_p_selection import PositionLists
from torch import Tensor

from sparsetrain.generation.settings import Refresh

Find = Callable[[Tensor | None, PositionLists | None], tuple[Tensor, Tensor]]
"""Lists and counts of a choice for the rows that are due, bool ``[B]``; None for all. They may be made in the tensors
that are handed along, where those of other rows stay; elsewhere those of others are undefined."""


class Choice(NamedTuple):
    """The keys that each KV head reads, beside the first and the last tokens."""

    lists: Tensor
    """int32 ``[B, Hkv, capacity]``: positions, ascending."""
    counts: Tensor
    """int32 ``[B, Hkv]``: entries of each list."""
    lengths: Tensor
    """int32 ``[B]``: tokens of each row when it was made."""
    query: Tensor
    """fp32 ``[B, D]``: the mean query of the heads then; ``[B, 0]`` where nothing is compared with it."""


class Choices:
    """The choices of one layer.

    Args:
        refresh: when they are made.
        index: of the layer, by which they are staggered.
        rollback: tokens that can be taken back, and the choices that were made for them.
        static: the number of the step is a tensor, and tensors stay where they are.
    """

    def __init__(self, refresh: Refresh, index: int, *, rollback: int, static: bool) -> None:
        self._every, self._similarity = refresh.every, refresh.similarity
        self._phase = index % refresh.every if refresh.staggered else 0
        # Beside the stretches that are taken back, the one where it goes on and the one before.
        self._depth = -(-rollback // refresh.every) + 2 if rollback else 1
        self.static = static
        """The number of the step is a tensor."""
        self._held: Choice | None = None  # of each stretch, [B, depth, ...], or [B, ...] of one
        self._dropped: Tensor | None = None  # keys without room, where lists are made in place
        self._begins: Tensor | None = None  # whether a choice may be due, bool [steps]
        self._step: Any = 0
        self._first: Any = 0  # the step at which there is no choice yet
        self._highest: Any = 0  # the highest step from which tokens have been taken back

    def held(self) -> tuple[Tensor | None, ...]:
        """The tensors that steps read and change: choices ``[B, ...]``, marks of steps ``[steps]``, numbers ``[1]``."""
        numbers = (each if isinstance(each, Tensor) else None for each in (self._step, self._first, self._highest))
        return *(self._held or ()), self._dropped, self._begins, *numbers

    def nbytes(self) -> int:
        """Bytes of the choices."""
        held = (*(self._held or ()), self._dropped, self._begins)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def restart(self) -> None:
        """The next step is the first behind a prompt."""
        if isinstance(self._step, Tensor):
            for number in (self._step, self._first, self._highest):
                number.zero_()
            self._divide()
        else:
            self._step = self._first = self._highest = 0

    def make_room(self, query: Tensor, lengths: Tensor, find: Find, *, steps: int) -> None:
        """Room for static choices: as much as one needs that no row is due for.

        Args:
            query: ``[B, Hq, 1, D]``.
            lengths: int32 ``[B]``.
            find: makes a choice.
            steps: that there may be.
        """
        nobody = torch.zeros(len(lengths), dtype=torch.bool, device=query.device)
        self._fit(Choice(*find(nobody, None), lengths, self._mean(query)))
        if not isinstance(self._step, Tensor):
            self._step, self._first, self._highest = (lengths.new_zeros(1, dtype=torch.int64) for _ in range(3))
            self._begins = nobody.new_empty(steps)
            for tensor in (self._step, self._first, self._highest, self._begins):
                torch._dynamo.mark_static_address(tensor)
            self._divide()

    def take(self, query: Tensor, lengths: Tensor, find: Find) -> Choice:
        """The choice for a step.

        Args:
            query: ``[B, Hq, 1, D]``.
            lengths: int32 ``[B]``: tokens of each row, the new one included.
            find: makes a choice.
        """
        first: Any = None
        if self._begins is None or self._similarity is not None or self._depth > 1:
            first = self._step == self._first
        place: Any = 0
        before: Any = 0
        if self._depth > 1:
            stretch = (self._step + self._phase) // self._every
            place, before = stretch % self._depth, (stretch - 1) % self._depth
        if self._begins is None:
            begins = (self._step + self._phase) % self._every == 0 or first
        else:
            begins = self._begins.index_select(0, self._step)
        if begins is not False:
            mean = self._mean(query)
            due = self._due(begins, first, mean, before)
            new = Choice(*find(due, self._into()), lengths, mean)
            held = self._fit(new)
            if due is not None:
                if isinstance(place, Tensor):
                    before = torch.where(begins & ~first, before, place)
                last = self._read(held, before)
                new = Choice(*(_of_rows(due, *pair) for pair in zip(new, last, strict=True)))
            self._write(held, place, new)
        self._step += 1
        assert self._held is not None
        return self._read(self._held, place)

    def rollback(self, tokens: int) -> None:
        """Forget the last ``tokens`` steps."""
        if isinstance(self._step, Tensor):
            self._highest.copy_(torch.maximum(self._highest, self._step))
            self._step.sub_(tokens).clamp_min_(0)
            lost = self._lost() | (self._step < self._first)
            self._first.copy_(torch.where(lost, self._step, self._first))
            self._highest.copy_(torch.where(lost, self._step, self._highest))
            self._divide()
            return
        self._highest = max(self._highest, self._step)
        self._step = max(self._step - tokens, 0)
        if self._lost() or self._step < self._first:
            self._first = self._highest = self._step

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64 ``[rows]``. Where their number stays, the tensors stay too."""
        if self._held is None:
            return
        chosen = Choice(*(tensor.index_select(0, rows) for tensor in self._held))
        if len(rows) == len(self._held.counts):
            for tensor, new in zip(self._held, chosen, strict=True):
                tensor.copy_(new)
        else:
            self._keep(chosen)

    # --- numbers ---------------------------------------------------------------------------------------------------

    def _due(self, begins: Any, first: Any, mean: Tensor, before: Any) -> Tensor | None:
        """The rows that choose, bool ``[B]``; None for all."""
        if self._similarity is None or first is True:
            return begins.expand(len(mean)).contiguous() if isinstance(begins, Tensor) else None
        assert self._held is not None
        last = self._read(self._held, before).query
        far = torch.cosine_similarity(mean, last, dim=-1) <= self._similarity
        return begins & (first | far)

    def _divide(self) -> None:
        """Mark the first step of each stretch, and the one at which there is no choice yet."""
        assert self._begins is not None
        steps = torch.arange(len(self._begins), device=self._begins.device)
        self._begins.copy_(((steps + self._phase) % self._every == 0) | (steps == self._first))

    def _mean(self, query: Tensor) -> Tensor:
        """What later queries are compared with, ``[B, D]``, of ``[B, Hq, 1, D]``."""
        return query[:, 0, 0, :0].float() if self._similarity is None else query[:, :, 0].float().mean(1)

    def _lost(self) -> Any:
        """Whether what a step needs is no longer kept: its stretch, and the one before."""
        last, now = self._highest - 1 + self._phase, self._step + self._phase
        return last // self._every - now // self._every + 1 >= self._depth

    # --- tensors ---------------------------------------------------------------------------------------------------

    def _into(self) -> PositionLists | None:
        """Where lists are made, if there is one place for them."""
        if not self.static or self._depth > 1 or self._held is None or self._dropped is None:
            return None
        return PositionLists(self._held.lists, self._held.counts, self._dropped)

    def _fit(self, new: Choice) -> Choice:
        """Room for choices like this one, in that of those before where it is enough."""
        held = self._held
        if held is not None and len(held.counts) == len(new.counts):
            more = new.lists.shape[-1] - held.lists.shape[-1]
            if more > 0 and not self.static:
                return self._keep(held._replace(lists=torch.nn.functional.pad(held.lists, (0, more))))
            if more == 0 or not self.static:
                return held
        depth = () if self._depth == 1 else (self._depth,)
        return self._keep(Choice(*(each.new_zeros(len(each), *depth, *each.shape[1:]) for each in new)))

    def _keep(self, held: Choice) -> Choice:
        self._held = held
        if self.static:
            self._dropped = torch.zeros_like(held.counts)
            for tensor in (*held, self._dropped):
                torch._dynamo.mark_static_address(tensor)
        return held

    def _read(self, held: Choice, place: Any) -> Choice:
        """The choices of a stretch."""
        if self._depth == 1:
            return held
        if isinstance(place, Tensor):
            return Choice(*(tensor.index_select(1, place.reshape(1))[:, 0] for tensor in held))
        return Choice(*(tensor[:, place] for tensor in held))

    def _write(self, held: Choice, place: Any, new: Choice) -> None:
        for tensor, each in zip(held, new, strict=True):
            if each is tensor or each.numel() == 0:
                continue
            if self._depth > 1 and isinstance(place, Tensor):
                tensor.index_copy_(1, place.reshape(1), each[:, None])
            else:
                kept = tensor if self._depth == 1 else tensor[:, place]
                kept[..., : each.shape[-1]].copy_(each)


def _of_rows(due: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new one of the rows that are due, of others the old one, ``[B, ...]``."""
    if new is old or new.numel() == 0:  # made in place, or of nothing
        return new
    return torch.where(due.reshape(-1, *[1] * (new.dim() - 1)), new, old[..., : new.shape[-1]])
