"""Backward passes that have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_derivative_only(backward: Backward) -> Backward:
    """The ``backward`` of an autograd function, differentiated once and refused the second time.

    As ``torch.autograd.function.once_differentiable``, which refuses in ``.backward()`` alone: its gradients depend on
    nothing that ``torch.autograd.grad(..., inputs)`` looks for, and what it cannot differentiate counts as zero there.
    These depend on all that was saved, so something differentiable must be among it.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = list(backward(ctx, *grads))
        places = [place for place, gradient in enumerate(found) if gradient is not None]
        inputs = [tensor for tensor in (*grads, *ctx.saved_tensors) if tensor is not None and tensor.requires_grad]
        refused = _Refused.apply(len(places), *(found[place] for place in places), *inputs)
        for place, gradient in zip(places, refused, strict=True):
            found[place] = gradient
        return tuple(found)

    return run


class _Refused(torch.autograd.Function):
    """The first ``count`` tensors, as if they were computed from the others by something without a derivative."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "sparsetrain's operations are differentiable once; for a gradient of a gradient take the dense ones "
            "(block_pattern_attention_dense, selected_attention_dense, causal_attention_dense)"
        )
