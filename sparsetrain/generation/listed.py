"""Attention that reads few of its keys in a step. All stay in pages, with smaller tensors from which a step chooses.

A step takes the candidates of a selector (``selectors.py``) and chooses of them by their codes of 4 bits (Twilight,
2502.02770), or takes the keys of an earlier step (RefreshKV, 2411.05787). It attends to them, to the first tokens and
to the last ones. Keys are never copied: a choice is a list of positions. Prompts read all of theirs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sparsetrain_kernels import append_tokens, estimate_scores, key_weights, listed_decode, top_k_lists, top_p_lists
from sparsetrain_kernels.block_decode import block_pattern_decode
from sparsetrain_kernels.key_mirror import KeyMirror, key_statistics
from sparsetrain_kernels.top_p_selection import PositionLists
from torch import Tensor, nn

from sparsetrain.generation.approximation import weight_share
from sparsetrain.generation.candidates import GRANULE, Always, Candidates
from sparsetrain.generation.choices import Choices
from sparsetrain.generation.exact import WholeStep, keys_only, whole_step
from sparsetrain.generation.observed import Observations, is_observing
from sparsetrain.generation.own_blocks import OwnBlocks
from sparsetrain.generation.pages import ROLLBACK, Attend, PagedMemory
from sparsetrain.generation.selectors import HeavyChannels, Places, QuestPages, Selector
from sparsetrain.generation.settings import Decode
from sparsetrain.methods.memory import addresses
from sparsetrain.patterns import Pattern

LEAST_CAPACITY = 8192
"""Room of a list, at least; a quarter of all keys where that is more."""


class ListedMemory(PagedMemory):
    """Keys in pages, and a choice of them.

    Args:
        pattern: full attention in pages of a multiple of 16 tokens, or with ``select: own`` a pattern of such blocks.
        attend: its attention of many rows.
        decode: what is chosen and when.
        index: of the layer, by which choices are staggered.
        room: ``max_length``, ``rollback`` and ``budget`` of :class:`~sparsetrain.generation.pages.PagedMemory`.
    """

    chooses = True

    def __init__(self, pattern: Pattern, attend: Attend, decode: Decode, index: int, **room: Any) -> None:
        self.decode, self.index = decode, index
        self._selector = _make_selector(decode, index, pattern)
        # Steps that choose read all keys, so nothing is kept to estimate them by.
        self._whole = decode.refresh is not None and decode.refresh.choose == "full"
        keeps = decode.refresh is not None and decode.refresh.keep is not None
        self._mirrors = (decode.prune is not None or keeps) and not self._whole
        self._whole_step: WholeStep | None = None  # of the token that is read now
        self._centred = self._mirrors or self._selector.centred
        prune = decode.prune
        self._prune: dict[str, Any] = {} if prune is None else {**prune.model_dump(), "p": prune.p_of(index)}
        self._prompts: Tensor | None = None  # tokens of each row's, int32 [B]
        self._center: Tensor | None = None
        self._spread: Tensor | None = None
        rollback = room.get("rollback", ROLLBACK)
        self._most_guesses = rollback + 1
        self._choices: Choices | None = None
        self._end: tuple[Tensor, dict[str, Any]] | None = None  # queries of the last tokens of the prompt
        self._observations = Observations()
        super().__init__(pattern, attend, **room)
        if decode.refresh is not None:
            self._choices = Choices(decode.refresh, index, rollback=rollback, static=self.static)

    def reset(self) -> None:
        """See :meth:`Memory.reset`."""
        super().reset()
        self._prompt, self._blank = 0, True
        self._in_round = False
        if self._choices is not None:
            self._choices.restart()
        self._observations.reset()

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, starts: list[int] | None, **options: Any
    ) -> Tensor:
        """See :meth:`Memory.attend`. Several tokens that may be guesses read what they would read one by one."""
        padded = starts is not None and any(starts)
        count = max(query.shape[2], self.part_of)
        many = count > 1 and count > (self._most_guesses if self._in_round else self._steps)
        if not self.started or padded or many:
            later = self.longest > 0
            out = super().attend(layer, query, key, value, starts=starts, **options)
            if later and self._centred:
                # A chunk of a prompt, or another turn: codes are centred and scaled by all tokens, as of one prompt.
                self._write_again(self.longest, whole=True)
            self._prompt, self._prompts = self.longest, self._tensors()[3].clone()
            if self._choices is not None:
                self._choices.restart()
                if self._choices.static:
                    last = query[:, :, -1:].detach()
                    find, room = partial(self._lists, last, options), self.max_length or 0
                    self._choices.make_room(last, self._tensors()[3], find, steps=room)
                if self._whole:
                    self._end = query[:, :, -self._most_guesses :].detach().clone(), options
                    self._choose_at_end()
            return out
        if query.shape[2] == 1:
            return self._attend_one(query, key, value, options)
        tokens = zip(query.split(1, 2), key.split(1, 2), value.split(1, 2), strict=True)
        return torch.cat([self._attend_one(q, k, v, options) for q, k, v in tokens], dim=2)

    def _choose_at_end(self) -> None:
        """The last token of the prompt chooses, where its step reads all keys."""
        assert self._end is not None
        assert self._choices is not None
        if self.started and self._end[0].shape[2]:
            last, options = self._end[0][:, :, -1:], self._end[1]
            self._choices.take(last, self._tensors()[3], partial(self._lists, last, options))

    def begin_round(self) -> None:
        """See :meth:`Memory.begin_round`: as many tokens as can be taken back may be guesses from now on."""
        self._in_round = True

    def rollback(self, tokens: int) -> None:
        """See :meth:`Memory.rollback`."""
        super().rollback(tokens)
        if tokens == 0 or self.lengths is None:
            return
        # Of each row: the one with the longest prompt may have gone.
        before = -1 if self._prompts is None else int((self._prompts - self.lengths).max())
        of_prompt = before > 0
        self._blank = self.longest == 0
        if self._choices is not None:
            self._choices.rollback(tokens)
            if self._end is not None and before >= 0:
                # Its choice may be gone, or that of another token is needed.
                query, options = self._end
                self._end = query[:, :, : max(query.shape[2] - before, 0)], options
                self._choices.restart()
                self._choose_at_end()
        if of_prompt:
            self._prompt, self._prompts = self.longest, self.lengths.clone()
            self._write_again(self.longest, whole=True)
        elif self._selector.shared:
            self._write_again(GRANULE, whole=False)

    def select_rows(self, rows: Tensor) -> None:
        """See :meth:`Memory.select_rows`."""
        super().select_rows(rows)
        if self.lengths is None:
            return
        index = rows.to(self.lengths.device)
        if self._prompts is not None:
            self._prompts = self._prompts[index]
        if self._center is not None and self._spread is not None:
            self._keep_moments(self._center[index], self._spread[index])
        if self._choices is not None:
            self._choices.select_rows(index)
        if self._end is not None:
            self._end = self._end[0].index_select(0, index), self._end[1]

    def nbytes(self) -> int:
        """See :meth:`Memory.nbytes`."""
        held = [self._prompts, self._center, self._spread, *self._selector.held(), *(self._end or ())[:1]]
        chosen = 0 if self._choices is None else self._choices.nbytes()
        return super().nbytes() + chosen + sum(tensor.nbytes for tensor in held if tensor is not None)

    def observations(self) -> dict[str, float]:
        """Statistics of the steps within :func:`~sparsetrain.generation.observed.observing`: ``kept``, the share of
        keys over steps, rows and KV heads; ``dropped``, that of keys for which a list had no room; and ``mass_min`` and
        ``mass_mean``, the least and the mean share of the softmax weight, by a dense pass now and then."""
        return self._observations.statistics()

    def fixed(self) -> tuple[Any, ...]:
        """See :meth:`Memory.fixed`."""
        chosen = () if self._choices is None else self._choices.held()
        held = (self._center, self._spread, *self._selector.held(), *chosen, *self._observations.held())
        refresh = self.decode.refresh
        keep = 0 if refresh is None or refresh.keep is None else self._keep()
        return *super().fixed(), *addresses(held), keep, self.decode.candidate_tokens(self._prompt)

    # --- a step --------------------------------------------------------------------------------------------------

    def _attend_one(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention of one new token a row, ``[B, Hq, 1, D]``."""
        self._append(key, value)
        keys, values, table, lengths = self._tensors()
        self._whole_step = None
        since: Tensor | None = None
        recent: Any = self._always().recent
        if self._choices is None:
            lists, counts = self._lists(query, options)
        else:
            choice = self._choices.take(query, lengths, partial(self._lists, query, options))
            lists, counts, recent, since = choice.lists, choice.counts, self.decode.recent, choice.lengths
        whole = self._whole_step
        if whole is not None and whole.due is None:
            return self._seen(query, whole.output, whole.lse, counts, since, whole, options)
        out, lse = listed_decode(
            query,
            keys,
            values,
            lists,
            counts,
            lengths=lengths,
            block_table=table,
            sinks=self._always().sinks,
            recent=recent,
            since=since,
            return_lse=True,
            **options,
        )
        if whole is not None and whole.due is not None:
            out, lse = whole.rows(out, lse)
        return self._seen(query, out, lse, counts, since, whole, options)

    def _seen(
        self,
        query: Tensor,
        out: Tensor,
        lse: Tensor,
        counts: Tensor,
        since: Tensor | None,
        whole: WholeStep | None,
        options: dict[str, Any],
    ) -> Tensor:
        """The output of a step, once it is counted. It read the lists of ``counts``, and of rows that were due in a
        ``whole`` step all keys; the most recent tokens are those of ``since``, and all later ones."""
        if is_observing():
            recent: Any = self._always().recent
            if since is not None:
                recent = self.decode.recent + self._tensors()[3] - since
            if whole is not None:
                rest = self._rest(counts, recent)
                counts = rest if whole.due is None else torch.where(whole.due[:, None], rest, counts)
            self._observe(query, out, lse, counts, recent, options)
        return out

    @torch.no_grad()
    def _lists(
        self,
        query: Tensor,
        options: dict[str, Any],
        due: Tensor | None = None,
        into: PositionLists | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Positions that each KV head reads, ``lists [B, Hkv, capacity]`` and ``counts [B, Hkv]``, of the rows that are
        due, bool ``[B]``; None for all. They are made in ``into`` if they can be."""
        if self._whole:
            return self._exact_lists(query, options, due, into)
        candidates = self._candidates(query, options, due)
        if not self._mirrors:
            return candidates.positions(self._always())
        scores, lse = self._estimate(query, candidates, options, due)
        if self.decode.prune is not None:
            found = self._top_p(scores, lse, candidates, due=due, into=into)
        else:
            given = {"k": min(self._keep(), self._room()), "width": candidates.pooled, "due": due, "into": into}
            found = candidates.choose(top_k_lists, scores, lse, self._always(), num_kv_heads=self._heads(), **given)
        if is_observing() and self.decode.prune is not None:
            dropped = found.dropped.sum(1)
            self._observations.drop(dropped if due is None else dropped.where(due, 0))
        return found.lists, found.counts

    def _exact_lists(
        self, query: Tensor, options: dict[str, Any], due: Tensor | None, into: PositionLists | None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`_lists`, by the exact weights of all keys, which :attr:`_whole_step` has then read."""
        keys, values, _, lengths = self._tensors()
        places = self._places(due)
        step = whole_step(query, keys, values, self.pattern, places, options)
        lse = keys_only(step.lse, options.get("sink_logits"))
        weights = key_weights(query, keys, lse, **places.arguments, **_factors(options))
        zero = torch.zeros_like(lse)
        self._whole_step = step
        given: dict[str, Any] = {"lengths": lengths, "sinks": self.decode.sinks, "recent": self.decode.recent}
        given |= {"num_kv_heads": keys.shape[1], "due": due, "into": into}
        most = self._room() if self.decode.refresh is None or self.decode.refresh.keep is None else self._keep()
        if self.decode.prune is not None:
            found = top_p_lists(weights, zero, capacity=min(most, self._room()), **self._prune, **given)
        else:
            found = top_k_lists(weights, zero, min(most, self._room()), width=Candidates.pooled, **given)
        return found.lists, found.counts

    def _candidates(self, query: Tensor, options: dict[str, Any], due: Tensor | None = None) -> Candidates:
        """What the selector passes on, of the rows that are due, bool ``[B]``."""
        return self._selector.candidates(query, self._places(due), **_factors(options))

    def _estimate(
        self, query: Tensor, candidates: Candidates, options: dict[str, Any], due: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores of the candidates from their codes, and the log-sum-exp of each row, of those that are due."""
        given = {**self._places(due).arguments, **_factors(options), **candidates.scored()}
        return estimate_scores(query, self._mirror(), **given)

    def _top_p(self, scores: Tensor, lse: Tensor, candidates: Candidates, **other: Any) -> PositionLists:
        """What the layer's top-p keeps of the candidates; ``other`` goes before the section."""
        room = self._room()
        capacity = min(room, max(LEAST_CAPACITY, room // 4) if candidates.most is None else candidates.most)
        given = {"num_kv_heads": self._heads(), "capacity": capacity, **self._prune, **other}
        return candidates.choose(top_p_lists, scores, lse, self._always(), **given)

    def _heads(self) -> int:
        """KV heads."""
        return self._tensors()[0].shape[1]

    def _room(self) -> int:
        """Tokens that a row's pages have room for."""
        return self._tensors()[2].shape[1] * self.pattern.block

    def _places(self, due: Tensor | None = None) -> Places:
        """Where the keys of each row are, and which rows are due."""
        _, _, table, lengths = self._tensors()
        return Places(lengths, table, self._room(), self.beside, self._prompt, due)

    def _always(self) -> Always:
        """What this step reads in any case."""
        return self._selector.always(self._places())

    def _keep(self) -> int:
        """Keys of a choice of RefreshKV."""
        assert self.decode.refresh is not None
        keep = self.decode.refresh.keep
        assert keep is not None
        return max(1, int(keep * self._prompt if keep < 1 else keep))

    def _keys_read(self, counts: Tensor, recent: int | Tensor) -> Tensor:
        """Keys that each KV head reads with those that it reads in any case, int32 ``[B, Hkv]``."""
        lengths = self._tensors()[3]
        always = torch.minimum(lengths, lengths.new_zeros(lengths.shape) + self._always().sinks + recent)
        return counts + always[:, None]

    def _rest(self, counts: Tensor, recent: int | Tensor) -> Tensor:
        """All keys but those that are read in any case, int32 ``[B, Hkv]``."""
        return self._tensors()[3][:, None] - self._keys_read(torch.zeros_like(counts), recent)

    def _observe(
        self, query: Tensor, out: Tensor, lse: Tensor, counts: Tensor, recent: Any, options: dict[str, Any]
    ) -> None:
        """Count what a step read; ``out`` is its output, ``lse`` the log-sum-exp of what was read."""
        keys, values, table, lengths = self._tensors()
        held = self._selector.visible(self._places()).expand(counts.shape)
        if self._observations.count(read=self._keys_read(counts, recent), held=held):
            _, whole = block_pattern_decode(
                query, keys, values, self.pattern, lengths=lengths, block_table=table, return_lse=True, **options
            )
            self._observations.weigh(weight_share(lse, whole, options.get("sink_logits")))

    # --- beside the keys -----------------------------------------------------------------------------------------

    def _mirror(self) -> KeyMirror:
        assert self._center is not None
        assert self._spread is not None
        return KeyMirror(self.beside["codes"], self.beside["scale_low"], self._center, self._spread)

    def _make_beside(self, key: Tensor, pages: int) -> dict[str, Tensor]:
        _, heads, _, width = key.shape
        block = self.pattern.block
        made = self._selector.make_beside(key, pages, block)
        if self._mirrors:
            made["codes"] = torch.zeros(pages, heads, block, width // 2, dtype=torch.uint8, device=key.device)
            made["scale_low"] = torch.zeros(pages, heads, block, 2, dtype=torch.float16, device=key.device)
        return made

    def _keep_moments(self, center: Tensor, spread: Tensor) -> None:
        """Take a mean and a spread of the keys, in the place of those before where they fit."""
        if self._center is not None and self._spread is not None and self._center.shape == center.shape:
            self._center.copy_(center)
            self._spread.copy_(spread)
        else:
            self._center, self._spread = center, spread
        self._selector.keep_moments(center, spread)

    def _write_again(self, tokens: int, *, whole: bool) -> None:
        """Make what is kept beside the last tokens of each row as if none had come behind them: bounds of the 16 that
        are being filled, and of a whole prompt its mean and spread too. Where some of its keys have gone, codes stay
        centred and scaled as they were: by more of its keys than are left."""
        keys, values, table, lengths = self._tensors()
        if tokens == 0 or (whole and not self._keeps_all()):
            return
        places = torch.arange(-tokens, 0, device=lengths.device) + lengths[:, None]
        inside = places.clamp_min(0)
        page = table.gather(1, inside // self.pattern.block).clamp_min(0).long()
        index = (page, slice(None), inside % self.pattern.block)
        key, value = (held[index].transpose(1, 2) for held in (keys, values))
        if whole and self._centred:
            self._keep_moments(*key_statistics(key, lengths))
        self._append_tokens(key, value, table)

    def _keeps_all(self) -> bool:
        """No key has gone. Reads the lengths on the host."""
        rows = zip(self.tables, self._lengths(), self._highest, strict=True)
        return all(all(table.owned(self._blocks(max(n, end)))[: self._blocks(n)]) for table, n, end in rows)

    @torch.no_grad()
    def _append_tokens(self, key: Tensor, value: Tensor, table: Tensor) -> None:
        """Write the newest tokens, and what is kept beside them."""
        keys, values, _, lengths = self._tensors()
        # Not the length, which a compiled step would be made for.
        if self._centred and self._blank:
            self._keep_moments(*key_statistics(key, lengths))
        self._blank = False
        append_tokens(
            key,
            value,
            keys,
            values,
            lengths=lengths,
            block_table=table,
            mirror=self._mirror() if self._mirrors else None,
            **self._selector.written(self.beside),
        )
        self._selector.append(key, self._places()._replace(block_table=table))


def _make_selector(decode: Decode, index: int, pattern: Pattern) -> Selector:
    """The selector that a section asks for in one layer."""
    if decode.select == "own":
        return OwnBlocks(decode, pattern)
    if decode.select == "channels":
        return HeavyChannels(decode, index)
    return QuestPages(decode) if decode.select == "quest" else Selector(decode)


def _factors(options: dict[str, Any]) -> dict[str, Any]:
    """The factors of the logits."""
    return {name: options.get(name) for name in ("scale", "softcap")}
