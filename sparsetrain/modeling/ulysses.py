"""Sequence parallelism: DeepSpeed-Ulysses around our attention function, for a sequence split over several ranks.

Outside attention every rank holds the same number of consecutive tokens. Inside attention it holds all tokens of some
heads: one all-to-all for queries, keys, values and the method's own inputs, and a second for the output
(:mod:`sparsetrain.modeling.head_exchange`). A method therefore attends as on one rank, with fewer heads.

The method is that of DeepSpeed-Ulysses (2309.14509), of which transformers has an integration by DeepSpeed (ALST,
2506.13996), ``UlyssesSPAttentionHF``. It is not used: it takes three all-to-alls on the way in and copies each tensor
before and behind them, does not know SparseK's scores and learned sinks, which have heads too, and gathers positions in
every layer to find the documents. It also wraps the attention function for the whole process, so that every model would
be split, in training and in evaluation, where each rank has its own rows. Here only forward passes with the argument
:data:`ULYSSES_ARGUMENT` are split. It is passed on like ``cu_seqlens``, also to recomputed layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.modeling.attention.call import AttentionCall
from sparsetrain.modeling.head_exchange import collect_heads, deal_heads

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
        heads, kv_heads = call.query.shape[1], call.key.shape[1]
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
        names = sorted(call.extra)
        given = (call.query, call.key, call.value, *(call.extra[name] for name in names))
        query, key, value, *extra = deal_heads(given, self.group)
        sinks = call.sink_logits
        if sinks is not None:
            sinks = sinks.tensor_split(self.size)[self.rank]
        dealt = replace(
            call, query=query, key=key, value=value, extra=dict(zip(names, extra, strict=True)), sink_logits=sinks
        )
        return collect_heads(attend(module, dealt), self.group)
