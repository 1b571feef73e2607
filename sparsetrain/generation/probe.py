"""What a layer would lose by reading few keys: measured beside one dense pass over a text, for several p at once.

The pass attends to everything. Sampled rows of it are then taken as if each were a step of generation of its own: they
become a batch whose rows share the text's pages and differ in length. No n x n tensor is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sparsetrain_kernels import listed_decode
from sparsetrain_kernels.block_decode import block_pattern_decode
from sparsetrain_kernels.key_mirror import key_statistics
from torch import Tensor, nn

from sparsetrain.generation.approximation import output_error, weight_share
from sparsetrain.generation.listed import ListedMemory

TOGETHER = 8
"""Rows that are looked at together: their scores are ``[8, Hq, N]``."""


class Loss(NamedTuple):
    """What sampled rows lose, fp32 on the host; P is the number of shares p, R that of rows."""

    error: Tensor
    """``[P, R, Hq]``: norm of the output's error over the norm of the output; 0 of a row that reads all its keys."""
    mass: Tensor
    """``[P, R, Hq]``: true softmax weight of the keys that are read."""
    kept: Tensor
    """``[P, R, Hkv]``: keys that are read."""
    candidate_mass: Tensor
    """``[R, Hq]``: true softmax weight of the keys that the selector passes on, with the first and last ones; 1 where
    those are all."""
    keys: Tensor
    """``[R]``: keys that there are."""


def join(parts: Iterable[Loss]) -> Loss:
    """The loss of the rows of all parts."""
    return Loss(*(torch.cat(each, dim=int(each[0].dim() == 3)) for each in zip(*parts, strict=True)))


class ChannelWeights(ListedMemory):
    """The memory of one pass over one text, which attends to everything and weighs the channels of keys.

    A channel's share of the logits is as large as the query in it times what keys differ by in it: the product that
    Double Sparsity (2408.07092, section 3) sorts channels by, less what all keys share.
    """

    def __init__(self, *given: Any, **room: Any) -> None:
        super().__init__(*given, **room)
        self.weights: Tensor | None = None
        """fp32 ``[Hkv, D]`` on the host, once the pass has been here."""

    @torch.no_grad()
    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, starts: list[int] | None, **options: Any
    ) -> Tensor:
        """See :meth:`Memory.attend`. For the whole text at once."""
        out = self._attend(layer, query, key, value, cu_seqlens=None, q_start=None, **options)
        _, spread = key_statistics(key)
        size = query[0].float().square().mean(1).unflatten(0, (key.shape[1], -1)).mean(1).sqrt()
        self.weights = (size * spread[0]).cpu()
        return out


class Probe(ListedMemory):
    """The memory of one pass over one text, which attends to everything and measures.

    Args:
        at: int64 ``[R]``, ascending, on the host: the rows that are measured. Each ends a page of 16 tokens, so that no
            bounds that it sees hold a later token. Keys are centred and scaled by those before the first of them, as
            those of a prompt.
        shares: the p that are tried.
        given: as in :class:`~sparsetrain.generation.listed.ListedMemory`; ``decode`` has a ``prune``.
    """

    def __init__(self, *given: Any, at: Tensor, shares: Sequence[float], **room: Any) -> None:
        super().__init__(*given, **room)
        self._at, self._shares = at, shares
        self.loss: Loss | None = None
        """What was measured, once the pass has been here."""

    @torch.no_grad()
    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, starts: list[int] | None, **options: Any
    ) -> Tensor:
        """See :meth:`Memory.attend`. For the whole text at once."""
        out = super().attend(layer, query, key, value, starts=starts, **options)
        self._prompt = int(self._at[0])
        self._keep_moments(*key_statistics(key[:, :, : self._prompt]))
        self._append_tokens(key, value, self._tensors()[2])
        self.loss = join(self._measure(query, options))
        # One layer's keys at a time.
        self.keys = self.values = self._center = self._spread = None
        self.beside = {}
        return out

    def _measure(self, query: Tensor, options: dict[str, Any]) -> Iterator[Loss]:
        """The loss of a few rows at a time."""
        _, _, table, _ = self._tensors()
        center, spread = self._center, self._spread
        assert center is not None
        assert spread is not None
        for rows in self._at.split(TOGETHER):
            count = len(rows)
            at = rows.to(query.device)
            self.lengths, self.table = (at + 1).int(), table.expand(count, -1).contiguous()
            self._keep_moments(*(each.expand(count, -1, -1).contiguous() for each in (center, spread)))
            yield self._compare(query[0, :, at].transpose(0, 1)[:, :, None].contiguous(), options)

    def _compare(self, query: Tensor, options: dict[str, Any]) -> Loss:
        """The loss of steps, ``[R, Hq, 1, D]``."""
        keys, values, table, lengths = self._tensors()
        whole, dense = block_pattern_decode(
            query, keys, values, self.pattern, lengths=lengths, block_table=table, return_lse=True, **options
        )

        def read(lists: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
            given = {**self._always()._asdict(), "block_table": table, **options}
            out, lse = listed_decode(query, keys, values, lists, counts, return_lse=True, **given)
            return out, weight_share(lse, dense, options.get("sink_logits"))

        passed = self._candidates(query, options)
        if passed.most is None:
            candidates = torch.ones_like(dense[..., 0])
        else:
            _, candidates = read(*passed.positions(self._always()))
        scores, lse = self._estimate(query, passed, options)
        errors, masses, kept = [], [], []
        for p in self._shares:
            found = self._top_p(scores, lse, passed, p=p)
            out, mass = read(found.lists, found.counts)
            count = self._keys_read(found.counts, self.decode.recent)
            errors.append(output_error(out, whole, count, lengths))
            masses.append(mass)
            kept.append(count)
        measured = (torch.stack(errors), torch.stack(masses), torch.stack(kept), candidates, lengths)
        return Loss(*(each.float().cpu() for each in measured))
