"""The placement of scores by kernels as PyTorch knows it: two library operations, and the gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.first_derivative import first_derivative_only

torch.library.define(
    "sparsetrain::place_scores",
    "(Tensor linear, Tensor gain, Tensor position, Tensor first, float slope) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sparsetrain::place_next_score",
    "(Tensor linear, Tensor gain, Tensor position, Tensor total, Tensor squares, float slope) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sparsetrain::place_scores_bwd",
    "(Tensor grad, Tensor linear, Tensor gain, Tensor position, Tensor first, Tensor total, Tensor squares) "
    "-> (Tensor, Tensor)",
)


@torch.library.impl("sparsetrain::place_scores", "default")
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _launches().place_scores(*args)


@torch.library.impl("sparsetrain::place_next_score", "default")
def _next(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _launches().place_next_score(*args)


@torch.library.impl("sparsetrain::place_scores_bwd", "default")
def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    return _launches().place_scores_backward(*args)


def _launches() -> ModuleType:
    """The module that launches the kernels. Imported on first use: Triton may be absent."""
    from sparsetrain_kernels.score_placement.triton import launch

    return launch


@torch.library.register_fake("sparsetrain::place_scores")
def _forward_fake(linear: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    total, squares = (linear.new_empty(linear.shape, dtype=torch.float64) for _ in range(2))
    return linear.new_empty(linear.shape), total, squares


@torch.library.register_fake("sparsetrain::place_next_score")
def _next_fake(
    linear: Tensor, gain: Tensor, position: Tensor, total: Tensor, squares: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    return linear.new_empty(linear.shape), torch.empty_like(total), torch.empty_like(squares)


@torch.library.register_fake("sparsetrain::place_scores_bwd")
def _backward_fake(grad: Tensor, linear: Tensor, gain: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return linear.new_empty(linear.shape), gain.new_empty(gain.shape)


class PlaceScores(torch.autograd.Function):
    """The forward operation with its gradient; arguments are those of the operation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.sparsetrain.place_scores(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output[1:])

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        grad_linear, grad_gain = torch.ops.sparsetrain.place_scores_bwd(grad, *ctx.saved_tensors)
        return grad_linear, grad_gain, None, None, None
