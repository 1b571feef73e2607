"""Attention over a sequence that several ranks share: DeepSpeed-Ulysses around our attention function.

Outside attention every rank holds the same number of consecutive tokens. Inside, it holds all tokens of some heads: one
all-to-all each brings queries, keys and values there, and a fourth brings the output back. A method therefore attends
as on one rank, with fewer heads.

The all-to-alls are those of DeepSpeed's integration for transformers (ALST, 2506.13996), ``UlyssesSPAttentionHF``. What
is not used of it is ``register_with_transformers``, which wraps the registered function for the whole process: every
model in it would be split in training *and* in evaluation, where each rank has rows of its own, or else
(``disable_in_eval``) not in the checks before the first step, which run in evaluation mode. It also knows neither
SparseK's scores nor learned sinks, which have heads too, and finds the documents of a row by gathering its positions in
every layer. Here a forward pass that is to be split says so, by the argument :data:`ULYSSES_ARGUMENT`, which travels
like ``cu_seqlens``; a recomputed layer gets it again, and what does not get it is not split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.modeling.attention.call import AttentionCall

ULYSSES_ARGUMENT = "sparsetrain_ulysses"
"""Name under which the :class:`Ulysses` of a forward pass travels to the attention function."""

AttendCall = Callable[[nn.Module, AttentionCall], Tensor]
"""How a layer attends, ``[B, N, Hq, D]``."""


class Ulysses:
    """Wraps an attention function so that the ranks of ``group`` share each sequence.

    Args:
        group: the ranks, in the order of their tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._layers: dict[tuple[int, int, int], nn.Module] = {}

    def __call__(self, attend: AttendCall, module: nn.Module, call: AttentionCall) -> Tensor:
        """``attend`` over the whole sequence, called with this rank's tokens of it.

        Args:
            call: query ``[1, Hq, n, D]``, this rank's ``n`` tokens, as many on each rank; key and value
                ``[1, Hkv, n, D]``; extra inputs ``[1, Hkv, n]``, or ``[1, 1, n]`` where all heads share them;
                ``cu_seqlens`` of the whole sequence.

        Returns:
            ``[1, n, Hq, D]``.

        Raises:
            ModelError: the heads cannot be dealt out, or the documents of the sequence are not given.
        """
        query, key = call.query, call.key
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        if heads % self.size or (kv_heads % self.size and self.size % kv_heads):
            raise ModelError(
                f"{type(module).__name__} has {heads} query and {kv_heads} key/value heads, which {self.size} ranks "
                "cannot share (sequence.parallel)"
            )
        if call.padding is not None or call.cu_seqlens is None:
            raise ModelError(
                "a sequence that ranks share needs cu_seqlens of the whole sequence, and no attention mask"
            )
        # Sorted: the order of a set of strings differs between processes, and would exchange one for another.
        extra = {name: self._deal_heads(call.extra[name]) for name in sorted(call.extra)}
        sinks = call.sink_logits
        if sinks is not None:
            sinks = sinks.tensor_split(self.size)[self.rank]
        # The class gathers positions, which tell nothing that cu_seqlens does not: give it as few as it takes.
        positions = torch.zeros(1, 1, dtype=torch.long, device=query.device)
        out, _ = self._layer(heads, kv_heads, width)(
            module,
            query,
            key,
            call.value,
            None,
            position_ids=positions,
            attend=attend,
            call=replace(call, extra=extra, sink_logits=sinks),
        )
        return out.unflatten(-1, (heads, width))

    def _layer(self, heads: int, kv_heads: int, width: int) -> nn.Module:
        """DeepSpeed's wrapper for layers of this shape; nothing in it belongs to one layer or one call."""
        shape = (heads, kv_heads, width)
        if shape not in self._layers:
            from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

            self._layers[shape] = UlyssesSPAttentionHF(
                attn=_attend_dealt,
                batch_size=1,
                attn_head_count=heads,
                attn_head_size=width,
                kv_head_count=kv_heads,
                num_hidden_layers=0,
                process_group=self.group,
                seq_length_is_variable=True,
            )
        return self._layers[shape]

    def _deal_heads(self, values: Tensor) -> Tensor:
        """``[1, H, n]`` of this rank's tokens to ``[1, H / ranks, N]`` of all, copying heads that are too few."""
        heads = values.shape[1]
        if heads < self.size:
            values = values.repeat_interleave(self.size // heads, dim=1)
        for_ranks = values.unflatten(1, (self.size, -1)).movedim(1, 0)
        from_ranks: Tensor = _AllToAll.apply(for_ranks, self.group)
        return from_ranks.movedim(0, 2).flatten(2)


def _attend_dealt(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    attend: AttendCall,
    call: AttentionCall,
    position_ids: Tensor,
) -> tuple[Tensor, None]:
    """What DeepSpeed's wrapper calls with all tokens of some heads."""
    return attend(module, replace(call, query=query, key=key, value=value)), None


class _AllToAll(torch.autograd.Function):
    """Part ``i`` along the first dimension goes to rank ``i``; what comes back is ordered by the rank it comes from."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        values = values.contiguous()
        received = torch.empty_like(values)
        dist.all_to_all_single(received, values, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.forward(ctx, grad, ctx.group), None
