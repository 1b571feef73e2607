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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsetrain.errors import ModelError

ULYSSES_ARGUMENT = "sparsetrain_ulysses"
"""Name under which the :class:`Ulysses` of a forward pass travels to the attention function."""

AttentionFunction = Callable[..., tuple[Tensor, None]]


class Ulysses:
    """Wraps an attention function so that the ranks of ``group`` share each sequence.

    Args:
        group: the ranks, in the order of their tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._layers: dict[tuple[AttentionFunction, int, int, int], nn.Module] = {}

    def __call__(
        self,
        attention: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        extra_inputs: frozenset[str] = frozenset(),
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``attention`` over the whole sequence, called with this rank's tokens of it.

        Args:
            attention: takes what transformers' ``AttentionInterface`` passes.
            query: ``[1, Hq, n, D]``, this rank's ``n`` tokens; as many on each rank.
            key, value: ``[1, Hkv, n, D]``.
            extra_inputs: names of the keyword arguments with heads of their own: ``[1, Hkv, n]``, or ``[1, 1, n]``
                where all heads share them.
            s_aux: ``[Hq]`` learned sink logits.
            kwargs: handed on; among them ``cu_seqlens`` of the whole sequence.

        Returns:
            ``[1, n, Hq, D]``, and None for the attention weights.

        Raises:
            ModelError: the heads cannot be dealt out, or the documents of the sequence are not given.
        """
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        if heads % self.size or (kv_heads % self.size and self.size % kv_heads):
            raise ModelError(
                f"{type(module).__name__} has {heads} query and {kv_heads} key/value heads, which {self.size} ranks "
                "cannot share (sequence.parallel)"
            )
        if attention_mask is not None or kwargs.get("cu_seqlens") is None:
            raise ModelError(
                "a sequence that ranks share needs cu_seqlens of the whole sequence, and no attention mask"
            )
        # Sorted: the order of a set of strings differs between processes, and would exchange one for another.
        for name in sorted(extra_inputs & kwargs.keys()):
            kwargs[name] = self._deal_heads(kwargs[name])
        if s_aux is not None:
            kwargs["s_aux"] = s_aux.tensor_split(self.size)[self.rank]
        # The class gathers positions, which tell nothing that cu_seqlens does not: give it as few as it takes.
        kwargs["position_ids"] = torch.zeros(1, 1, dtype=torch.long, device=query.device)
        out, _ = self._layer(attention, heads, kv_heads, width)(module, query, key, value, None, **kwargs)
        return out.unflatten(-1, (heads, width)), None

    def _layer(self, attention: AttentionFunction, heads: int, kv_heads: int, width: int) -> nn.Module:
        """DeepSpeed's wrapper for layers of this shape; nothing in it belongs to one layer or one call."""
        shape = (attention, heads, kv_heads, width)
        if shape not in self._layers:
            from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

            self._layers[shape] = UlyssesSPAttentionHF(
                attn=attention,
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
