"""A SparseK layer in generation: one token at a time from the slots, several by the operator of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from sparsetrain_kernels.block_decode.inputs import MAX_ROWS
from sparsetrain_kernels.score_placement import DocumentPositions, Moments, document_positions
from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.methods.memory import Memory, addresses, alike
from sparsetrain.methods.sparsek.options import check_options
from sparsetrain.methods.sparsek.rounds import LONGEST, Round, Tokens
from sparsetrain.methods.sparsek.state import Sequence, SparseKState

Score = Callable[..., tuple[Tensor, Moments | None]]
"""``(layer, query, linear, gain, places, moments)``: the scores that compete, and the moments after them."""


class Chooser(Protocol):
    """Chooses what a step reads."""

    def __call__(self, query: Tensor, state: SparseKState, scale: float | None) -> Tensor:
        """The slots that a step with ``query [B, Hq, 1, D]`` reads, bool ``[B, H, slots]``."""

    def observations(self) -> dict[str, float]:
        """As of :meth:`Memory.observations`."""

    def held(self) -> tuple[Tensor | None, ...]:
        """Tensors that its steps change, of any shape ``[...]``."""

    def reset(self) -> None:
        """Forget all steps. Its tensors stay where they are."""


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
        self.most = state.sinks + state.topk + state.window
        self.choose: Chooser | None = None
        """Chooses what a step reads; None reads all that the slots hold."""
        self._round: Round | None = None
        self._rounds = False
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
        if self.static and not state.started:
            for tensor in vars(slots).values():
                torch._dynamo.mark_static_address(tensor)
        tokens = Tokens(query, key, value, sparsek_scores, sparsek_gain)
        self._remember(layer, tokens)
        # Guesses read what they would read one by one.
        most = 1
        if self.choose is not None and not any(starts or ()):
            most = LONGEST if self._rounds else MAX_ROWS
        if state.started and tokens.count <= most:
            if tokens.count == 1:
                return self._attend_one(layer, tokens, scale)
            parts = tokens.one_by_one()
            return torch.cat([self._attend_one(layer, part, scale) for part in parts], dim=2)
        out = torch.zeros_like(query)
        for (start, length), rows in alike(starts or [0] * state.rows, state.lengths).items():
            if start < tokens.count:
                part = tokens.of_rows(rows).part(slice(start, None))
                is_prompt = rows == slice(None) and start == length == 0
                out[rows, :, start:] = self._attend_many(layer, part, rows, length, scale, is_prompt=is_prompt)
        return out

    @property
    def chooses(self) -> bool:  # type: ignore[override]
        """See :attr:`Memory.chooses`."""
        return self.choose is not None

    def fixed(self) -> tuple[Any, ...]:
        """See :meth:`Memory.fixed`."""
        slots = () if self.state.slots is None else vars(self.state.slots).values()
        return addresses((*slots, *(() if self.choose is None else self.choose.held())))

    def observations(self) -> dict[str, float]:
        """See :meth:`Memory.observations`."""
        return {} if self.choose is None else self.choose.observations()

    def rollback(self, tokens: int) -> None:
        """See :meth:`Memory.rollback`: exact, for the last 64 tokens of a prompt, those of the last call of up to 128,
        and those of all calls since :meth:`begin_round` or the last rollback.

        Raises:
            ModelError: the slots have forgotten what they held before these tokens.
        """
        self._rounds, last = True, self._round
        self._round = None
        if tokens == 0 or self.state.slots is None:
            return
        if last is None or tokens > last.tokens:
            known = 0 if last is None else last.tokens
            raise ModelError(
                f"SparseK cannot take back {tokens} tokens: it remembers what it held {known} tokens ago. Call "
                "cache.activate_past_recording() before they are read, and take back at most "
                f"{LONGEST} at a time; a SparseCache needs rollback={tokens}"
            )
        self.state.slots.copy_(last.before)
        for token in last.first(last.tokens - tokens):
            self._step(last.layer, token)

    def begin_round(self) -> None:
        """See :meth:`Memory.begin_round`: from now on what is read is remembered until the next rollback."""
        self._rounds, self._round = True, None

    def nbytes(self) -> int:
        """See :meth:`Memory.nbytes`."""
        held = 0 if self.state.slots is None else sum(tensor.nbytes for tensor in vars(self.state.slots).values())
        return held if self._round is None else held + self._round.nbytes()

    def offload(self) -> None:
        """Raises :class:`ModelError`: there is nothing to gain."""
        raise ModelError("this cache is small and stays where the layer is; generate without an offloaded cache")

    def reset(self) -> None:
        """See :meth:`Memory.reset`."""
        self.state.reset()
        self._round = None
        if self.choose is not None:
            self.choose.reset()

    def select_rows(self, rows: Tensor) -> None:
        """See :meth:`Memory.select_rows`."""
        self.state.select_rows(rows)
        if self._round is not None:
            self._round = None

    def _attend_many(
        self,
        layer: nn.Module,
        tokens: Tokens,
        rows: list[int] | slice,
        length: int,
        scale: float | None,
        *,
        is_prompt: bool,
    ) -> Tensor:
        """Take in tokens of some rows, and their attention by the operator of training, ``[rows, Hq, n, D]``.

        Args:
            tokens: of these rows.
            length: tokens that they have read before.
            is_prompt: these are the first tokens of all rows.
        """
        state, count = self.state, tokens.count
        places = document_positions(count, None, tokens.query.device)
        places = DocumentPositions(places.position + length, places.first)
        scores, after = self._score(layer, tokens.query, tokens.linear, tokens.gain, places, state.moments(rows))
        new = Sequence(tokens.key, tokens.value, scores, places.position.expand_as(scores))
        sequence = state.sequence(rows, length, new)
        if is_prompt and not self.static:
            self._remember_prompt(layer, tokens, sequence)
        # What the slots hold asks nothing, but the operator wants a query for every key.
        batch, heads, _, width = tokens.query.shape
        nothing = tokens.query.new_zeros(batch, heads, sequence.key.shape[2] - count, width)
        asked = torch.cat([nothing, tokens.query], dim=2)
        # The slots have room for the config's topk, whatever training is at.
        answers = self._select_and_attend(
            layer, asked, sequence.key, sequence.value, sequence.scores, state.topk, None, scale
        )
        state.fill(rows, sequence, length + count, after)
        return answers[:, :, -count:]

    def _attend_one(self, layer: nn.Module, token: Tokens, scale: float | None) -> Tensor:
        """Take in one token a row, and its attention, ``[B, Hq, 1, D]``."""
        self._step(layer, token)
        kept = None if self.choose is None else self.choose(token.query, self.state, scale)
        return self.state.attend(token.query, gate=self.gate, scale=scale, kept=kept)

    def _step(self, layer: nn.Module, token: Tokens) -> None:
        """Take in one token a row."""
        state, length = self.state, self.state.started_slots.length[:, None]
        places = DocumentPositions(length, None)
        before = state.moments(slice(None))
        scores, after = self._score(layer, token.query, token.linear, token.gain, places, before)
        state.step(token.key, token.value, scores, after)

    @torch.no_grad()
    def _remember_prompt(self, layer: nn.Module, tokens: Tokens, sequence: Sequence) -> None:
        """Remember the end of a first call: assisted generation reads its first draft together with the prompt."""
        state, cut = self.state, max(tokens.count - LONGEST // 2, 0)
        if cut:
            head = tokens.part(slice(cut))
            places = document_positions(cut, None, head.query.device)
            _, after = self._score(layer, head.query, head.linear, head.gain, places, state.moments(slice(None)))
            state.fill(slice(None), Sequence(*(each[:, :, :cut] for each in sequence)), cut, after)
        before = state.started_slots.map(Tensor.clone)
        self._round = Round(layer, before, [tokens.part(slice(cut, None)).copy()])

    def _remember(self, layer: nn.Module, tokens: Tokens) -> None:
        """Remember a call whose tokens may be taken back: several at once are a draft, and what is read in a round."""
        if self.static:
            return
        # What changes on the host with every token would be compiled anew with every token.
        drafted = not torch.compiler.is_compiling() and self.state.started and tokens.count <= LONGEST
        if drafted and not self._rounds and tokens.count == 1:
            # The tokens behind a prompt: a draft model reads them one by one, and hears of the round at its end.
            drafted = self._round is not None and self._round.tokens < LONGEST
        if not drafted:
            if self._round is not None:
                self._round = None
            return
        over = self._round is not None and self._round.tokens + tokens.count > LONGEST
        if self._round is None or over or (tokens.count > 1 and not self._rounds):
            self._round = Round(layer, self.state.started_slots.map(Tensor.clone))
        self._round.calls.append(tokens.copy())
