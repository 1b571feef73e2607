"""Stand-ins for the attention of a whole model, by names of their own in transformers: none, and FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsetrain.bench.contenders.flex import listed_block_mask
from sparsetrain.bench.measure import Unavailable
from sparsetrain.modeling.attention.name import lift_guard
from sparsetrain.patterns import Pattern

BARE = "bench_none"
FLEX = "bench_pattern"


class _Through(torch.autograd.Function):
    """The queries. Every projection gets a gradient, so that its own backward is part of the step."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.kv_heads = key.shape[1]
        return query.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grads[0].transpose(1, 2)
        some = grad[:, : ctx.kv_heads]
        return grad, some, some


def use_no_attention(model: PreTrainedModel) -> None:
    """Each layer hands its queries on: what is left of a step is the limit that no attention could beat."""

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return _Through.apply(query, key, value), None

    _register(BARE, forward)
    lift_guard(model)
    model.set_attn_implementation(BARE)


def use_flex(model: PreTrainedModel, pattern: Pattern, length: int, device: torch.device) -> None:
    """A block pattern by compiled FlexAttention, its block mask made once.

    Raises:
        Unavailable: there is no CUDA device, or the pattern's blocks are not made of FlexAttention's.
    """
    if device.type != "cuda":
        raise Unavailable("FlexAttention's backward needs CUDA")
    from torch.nn.attention.flex_attention import flex_attention

    mask = listed_block_mask(pattern, length, device)
    compiled = torch.compile(flex_attention)

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        out = compiled(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    _register(FLEX, forward)
    lift_guard(model)
    model.set_attn_implementation(FLEX)


def _register(name: str, forward: Any) -> None:
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
