"""A memory that compares each of its steps with one that reads everything, and counts what the step read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sparsetrain_kernels.block_decode import block_pattern_decode
from sparsetrain_kernels.top_p_selection import PositionLists
from torch import Tensor

from sparsetrain.generation.approximation import output_error, weight_share
from sparsetrain.generation.listed import ListedMemory

ELEMENT = 2
"""Bytes of an element of the cache, as in bf16, whatever dtype a model runs in: codes of 4 bits beside keys of fp32
would look twice as cheap as they are."""
CODES = ("codes", "scale_low")


class Step(NamedTuple):
    """What one step of a layer read and lost, on the host."""

    error: Tensor
    """fp32 ``[B, Hq]``: norm of the output's error over the norm of the output of all keys, for the same query and
    cache; 0 where all keys were read."""
    mass: Tensor
    """fp32 ``[B, Hq]``: true softmax weight of the keys that were read."""
    keys: Tensor
    """fp32 ``[B]``: keys that a KV head read, in the mean over heads."""
    bytes: Tensor
    """fp32 ``[B]``: keys, values, and what the choice was made from, of all KV heads, with elements of two bytes."""
    length: Tensor
    """fp32 ``[B]``: keys that there were."""
    dense_bytes: Tensor
    """fp32 ``[B]``: keys and values of all of them."""


class MeasuredMemory(ListedMemory):
    """A :class:`~sparsetrain.generation.listed.ListedMemory` whose every step within
    :func:`~sparsetrain.generation.observed.observing` is compared with full attention.

    The bytes of a choice are the codes of all candidates and what the selector keeps of all tokens. Scores that a
    choice writes and reads again, and lists, are not counted: they stay in the cache of the device.
    """

    def reset(self) -> None:
        """See :meth:`Memory.reset`."""
        super().reset()
        self._estimated: Tensor | None = None
        self.steps: list[Step] = []
        """Of each step since."""

    def _lists(
        self, query: Tensor, options: dict[str, Any], due: Tensor | None = None, into: PositionLists | None = None
    ) -> tuple[Tensor, Tensor]:
        self._estimated = self._selector_bytes()
        found = super()._lists(query, options, due, into)
        if due is not None:
            # A row that goes on with its last choice would not have made this one alone.
            self._estimated = self._estimated.where(due, 0)
        return found

    def _estimate(
        self, query: Tensor, candidates: Any, options: dict[str, Any], due: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores, lse = super()._estimate(query, candidates, options, due)
        heads, width = self._tensors()[0].shape[1::2]
        read = (scores > float("-inf")).unflatten(1, (heads, -1))[:, :, 0].sum(dim=(1, 2))
        assert self._estimated is not None
        self._estimated = self._estimated + read * (width // 2 + 4)
        return scores, lse

    def _selector_bytes(self) -> Tensor:
        """Bytes of the tensors from which candidates are chosen, of all tokens of each row."""
        keys, _, _, lengths = self._tensors()
        pages, _, block, _ = keys.shape
        beside = (tensor for name, tensor in self.beside.items() if name not in CODES)
        sizes = (tensor.numel() * (ELEMENT if tensor.dtype == keys.dtype else tensor.itemsize) for tensor in beside)
        return lengths.double() * (sum(sizes) / (pages * block))

    def _observe(
        self, query: Tensor, out: Tensor, lse: Tensor, counts: Tensor, recent: Any, options: dict[str, Any]
    ) -> None:
        keys, values, table, lengths = self._tensors()
        heads, width = keys.shape[1::2]
        whole, dense = block_pattern_decode(
            query, keys, values, self.pattern, lengths=lengths, block_table=table, return_lse=True, **options
        )
        kept = self._keys_read(counts, recent)
        chosen = torch.zeros_like(lengths) if self._estimated is None else self._estimated
        self._estimated = None
        pair = 2 * width * ELEMENT
        found = (
            output_error(out, whole, kept, lengths),
            weight_share(lse, dense, options.get("sink_logits")),
            kept.double().mean(dim=1),
            kept.sum(dim=1) * pair + chosen,
            lengths,
            lengths * (heads * pair),
        )
        self.steps.append(Step(*(each.float().cpu() for each in found)))


class WindowMemory(MeasuredMemory):
    """Attends to the first and the last tokens alone, ``sinks`` and ``recent`` of the section (StreamingLLM's pattern,
    2309.17453, but for positions, which stay as they are)."""

    def __init__(self, *given: Any, **room: Any) -> None:
        super().__init__(*given, **room)
        self._mirrors = self._centred = False

    def _lists(
        self, query: Tensor, options: dict[str, Any], due: Tensor | None = None, into: PositionLists | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, heads = query.shape[0], self._tensors()[0].shape[1]
        empty = torch.zeros(rows, heads, 1, dtype=torch.int32, device=query.device)
        return empty, empty[:, :, 0].contiguous()


class OracleMemory(MeasuredMemory):
    """Chooses by the true softmax weights instead of an estimate: what no way to choose as many keys, or as much
    weight, can improve on.

    With ``prune`` each query head needs the fewest keys that hold ``p`` of its weight, and a KV head reads what any of
    its heads needs. With ``refresh.keep`` a KV head reads the keys whose largest weight over its heads is highest.
    """

    def __init__(self, *given: Any, **room: Any) -> None:
        super().__init__(*given, **room)
        self._mirrors = self._centred = False

    def _lists(
        self, query: Tensor, options: dict[str, Any], due: Tensor | None = None, into: PositionLists | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, _, _, lengths = self._tensors()
        heads = keys.shape[1]
        weights = self._weights(query, options)
        places = torch.arange(weights.shape[-1], device=weights.device, dtype=torch.int32)
        end = (lengths - self.decode.recent)[:, None, None]
        free = (places >= self.decode.sinks) & (places < end)
        if self.decode.prune is not None:
            needed = _top_p(weights, free, self._prune["p"], self._prune["min_keys"])
            chosen = needed.unflatten(1, (heads, -1)).any(dim=2)
        else:
            chosen = _top_k(weights.unflatten(1, (heads, -1)).amax(dim=2), free, self._keep())
        lists = torch.where(chosen, places, len(places)).sort().values.int()
        return lists, chosen.sum(-1, dtype=torch.int32)

    def _weights(self, query: Tensor, options: dict[str, Any]) -> Tensor:
        """Softmax over all keys, fp32 ``[B, Hq, room]``."""
        keys, _, table, lengths = self._tensors()
        rows, heads, width = len(lengths), *keys.shape[1::2]
        held = keys[table.clamp_min(0).long()].transpose(1, 2).flatten(2, 3).float()
        asked = query[:, :, 0].unflatten(1, (heads, -1)).float()
        scale = options.get("scale")
        logits = asked @ held.transpose(2, 3) * (width**-0.5 if scale is None else scale)
        softcap = options.get("softcap")
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        there = torch.arange(held.shape[2], device=held.device) < lengths.reshape(rows, 1, 1, 1)
        return logits.masked_fill(~there, float("-inf")).softmax(-1).flatten(1, 2)


def _top_p(weights: Tensor, free: Tensor, p: float, least: int) -> Tensor:
    """Of the ``free`` keys, the fewest that hold ``p`` of each row's weight together with all others, and ``least``
    ones at least; bool ``[B, Hq, N]``."""
    taken = weights.masked_fill(free, 0).sum(-1, keepdim=True)
    ordered, order = weights.masked_fill(~free, -1).sort(descending=True, stable=True)
    before = taken + ordered.clamp_min(0).cumsum(-1) - ordered.clamp_min(0)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    kept = ((before < p) | (rank < least)) & (ordered >= 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _top_k(weights: Tensor, free: Tensor, k: int) -> Tensor:
    """The ``k`` free keys of the highest weight, bool ``[B, Hkv, N]``."""
    best = weights.masked_fill(~free, -1).topk(min(k, weights.shape[-1]), dim=-1)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best.indices, best.values >= 0)
