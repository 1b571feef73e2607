"""Twilight among SparseK's slots: which of the few keys that are left a step reads.

It is there to measure how many of them matter. The slots change with every token, so their codes of 4 bits are made
anew in each step, which reads every key once more: no time is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from sparsetrain_kernels import KeyMirror, append_codes, estimate_scores, key_statistics, top_p_lists
from sparsetrain_kernels.sparsek_decode import EMPTY
from torch import Tensor

from sparsetrain.generation.observed import Observations, is_observing
from sparsetrain.generation.settings import Decode
from sparsetrain.methods.sparsek.state import SparseKState


class SlotPruning:
    """Keeps the slots of the fewest tokens that hold a share of the estimated softmax weight, gates left aside.

    Args:
        decode: a section with a ``prune``; its sinks and recent tokens are kept too.
        index: of the layer.
    """

    def __init__(self, decode: Decode, index: int) -> None:
        prune = decode.prune
        assert prune is not None
        self._decode = decode
        self._prune: dict[str, Any] = {**prune.model_dump(), "p": prune.p_of(index)}
        self._counters = Observations()

    def observations(self) -> dict[str, float]:
        """As of :meth:`~sparsetrain.generation.listed.ListedMemory.observations`, of the keys that the slots hold."""
        return self._counters.statistics()

    def reset(self) -> None:
        """Forget what the steps have read."""
        self._counters.reset()

    def held(self) -> tuple[Tensor | None, ...]:
        """The counters, ``[3]`` each."""
        return self._counters.held()

    @torch.no_grad()
    def __call__(self, query: Tensor, state: SparseKState, scale: float | None) -> Tensor:
        """The slots that a step reads.

        Args:
            query: ``[B, Hq, 1, D]``.
            state: the slots, the new token in them.
            scale: factor on the logits; None means ``D ** -0.5``.

        Returns:
            bool ``[B, H, slots]``.
        """
        slots = state.started_slots
        batch, heads, count, width = slots.keys.shape
        position = slots.positions.expand(batch, heads, count)
        held = position != EMPTY
        # The slots of a row as one page. Empty ones are zeros.
        lengths = position.new_full((batch,), count, dtype=torch.int32)
        table = torch.arange(batch, dtype=torch.int32, device=query.device)[:, None]
        codes = torch.empty(batch, heads, count, width // 2, dtype=torch.uint8, device=query.device)
        scale_low = torch.empty(batch, heads, count, 2, dtype=torch.float16, device=query.device)
        mirror = KeyMirror(codes, scale_low, *key_statistics(slots.keys))
        append_codes(slots.keys, mirror, lengths=lengths, block_table=table)
        places = torch.arange(count, dtype=torch.int32, device=query.device)
        scores, lse = estimate_scores(
            query,
            mirror,
            lengths=lengths,
            block_table=table,
            scale=scale,
            page_lists=places.where(held, -1),
            page_counts=lengths[:, None].expand(-1, heads).contiguous(),
            granule=1,
        )
        found = top_p_lists(scores, lse, lengths=lengths, num_kv_heads=heads, capacity=count, **self._prune)
        listed = torch.where(places < found.counts[..., None], found.lists, count).long()
        kept = held.new_zeros(batch, heads, count + 1).scatter(2, listed, True)[..., :count]
        recent = position >= (slots.length - self._decode.recent)[:, None, None]
        kept = held & (kept | recent | (position < self._decode.sinks))
        if is_observing():
            self._observe(query, slots.keys, held, kept, width**-0.5 if scale is None else scale)
        return kept

    def _observe(self, query: Tensor, keys: Tensor, held: Tensor, kept: Tensor, scale: float) -> None:
        """Count what a step reads, and measure its weight now and then."""
        if self._counters.count(read=kept, held=held):
            grouped = query[:, :, 0].float().unflatten(1, (keys.shape[1], -1))
            logits = (grouped @ keys.float().mT * scale).masked_fill(~held[:, :, None], float("-inf"))
            self._counters.weigh((logits.softmax(-1) * kept[:, :, None]).sum(-1))
