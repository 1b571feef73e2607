"""Sequence parallelism: DeepSpeed-Ulysses around our attention function, for a sequence split over several ranks.

Outside attention every rank holds the same number of consecutive tokens. Inside attention it holds all tokens of some
heads: one all-to-all each for queries, keys and values, and a fourth for the output. A method therefore attends as on
one rank, with fewer heads.

The all-to-alls are those of DeepSpeed's integration for transformers (ALST, 2506.13996), ``UlyssesSPAttentionHF``. Its
``register_with_transformers`` is not used, because it wraps the attention function for the whole process: every model
would be split, in training and in evaluation, where each rank has its own rows. With ``disable_in_eval`` the self-check
before the first step, which runs in evaluation mode, would not be split. It also does not handle SparseK's scores and
learned sinks, which have heads too, and gathers positions in every layer to find the documents. Here only forward
passes with the argument :data:`ULYSSES_ARGUMENT` are split. It is passed on like ``cu_seqlens``, also to recomputed
layers.
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
"""Keyword argument that passes the :class:`Ulysses` of a forward pass to the attention function."""

AttendCall = Callable[[nn.Module, AttentionCall], Tensor]
"""A layer's attention; it returns ``[B, N, Hq, D]``."""


class Ulysses:
    """Wraps an attention function so that each sequence is split over the ranks of ``group``.

    Args:
        group: The ranks, in the order of their tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._layers: dict[tuple[int, int, int], nn.Module] = {}

    def __call__(self, attend: AttendCall, module: nn.Module, call: AttentionCall) -> Tensor:
        """Run ``attend`` over the whole sequence, given this rank's tokens.

        Args:
            call: Query ``[1, Hq, n, D]`` for this rank's ``n`` tokens, the same number on each rank; key and value
                ``[1, Hkv, n, D]``; extra inputs ``[1, Hkv, n]``, or ``[1, 1, n]`` where all heads share them;
                ``cu_seqlens`` of the whole sequence.

        Returns:
            ``[1, n, Hq, D]``.

        Raises:
            ModelError: The heads cannot be divided among the ranks, or ``cu_seqlens`` is missing.
        """
        query, key = call.query, call.key
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        if heads % self.size or (kv_heads % self.size and self.size % kv_heads):
            raise ModelError(
                f"{type(module).__name__} has {heads} query and {kv_heads} key/value heads, which cannot be divided "
                f"among {self.size} ranks (sequence.parallel)"
            )
        if call.padding is not None or call.cu_seqlens is None:
            raise ModelError(
                "a sequence split over ranks needs cu_seqlens of the whole sequence, and no attention mask"
            )
        # Sorted, because the order of a set of strings differs between processes: ranks would exchange wrong tensors.
        extra = {name: self._deal_heads(call.extra[name]) for name in sorted(call.extra)}
        sinks = call.sink_logits
        if sinks is not None:
            sinks = sinks.tensor_split(self.size)[self.rank]
        # The class gathers positions, which cu_seqlens makes redundant: pass the fewest that it accepts.
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
        """DeepSpeed's wrapper for layers of this shape; it has no state of a single layer or call."""
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
        """From ``[1, H, n]`` of this rank's tokens to ``[1, H / ranks, N]`` of all; heads are repeated if too few."""
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
    """The function that DeepSpeed's wrapper calls with all tokens of some heads."""
    return attend(module, replace(call, query=query, key=key, value=value)), None


class _AllToAll(torch.autograd.Function):
    """All-to-all along the first dimension: slice ``i`` goes to rank ``i``; received slices are ordered by sender."""

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
