"""Attention of query, key and value as PyTorch knows it: two library operations, with their gradient and FLOP count.

They are opaque to ``torch.compile`` (one compilation for all lengths), visible to selective activation checkpointing
(the forward operation can be saved instead of recomputed) and to FLOP counters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsetrain_kernels.eager import called_plainly
from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.inputs import consecutive_rows


def define_attention(
    name: str,
    schema: str,
    inputs: Any,
    *,
    forward: Callable[[str], Callable[..., Any]],
    backward: Callable[[str], Callable[..., Any]],
    pairs: Callable[[Any], int],
    trained: int = 3,
    lse_gradient: bool = True,
) -> type[torch.autograd.Function]:
    """Define ``sparsetrain::{name}_fwd`` and ``sparsetrain::{name}_bwd``.

    Args:
        name: of the operations, without an ending.
        schema: the arguments of both, those of ``inputs`` and ``str backend``.
        inputs: a named tuple; tensors with gradients come first, query, key and value at their head, and ``scale``
            behind the last tensor.
        forward: gives, for a backend, the function of ``inputs`` that returns the output ``[B, Hq, N, D]`` and the
            log-sum-exp ``[B, Hq, N]``, fp32 or fp64.
        backward: gives, for a backend, the function of ``inputs``, the gradients of these two (that of the log-sum-exp
            may be None, and is left out without ``lse_gradient``) and the two themselves that returns the gradients of
            the first ``trained`` tensors.
        pairs: counts the pairs of a query and a key of ``inputs`` in all query heads.
        trained: how many tensors have gradients.
        lse_gradient: whether the log-sum-exp has one.

    Returns:
        The forward operation with its gradient.
    """
    tensors = inputs._fields.index("scale")
    torch.library.define(f"sparsetrain::{name}_fwd", f"({schema}) -> (Tensor, Tensor)")
    torch.library.define(
        f"sparsetrain::{name}_bwd",
        f"(Tensor grad_out, {'Tensor? grad_lse, ' * lse_gradient}Tensor out, Tensor lse, {schema}) -> "
        f"({', '.join(['Tensor'] * trained)})",
    )
    # Tensors between the output's gradient and the arguments of the forward operation.
    before = 2 + lse_gradient
    run_forward = getattr(torch.ops.sparsetrain, f"{name}_fwd")
    run_backward = getattr(torch.ops.sparsetrain, f"{name}_bwd")

    def _forward(*args: Any) -> Any:
        return forward(args[-1])(inputs._make(args[:-1]))

    def _backward(grad_out: Tensor, *args: Any) -> Any:
        return backward(args[-1])(inputs._make(args[before:-1]), consecutive_rows(grad_out), *args[:before])

    torch.library.impl(f"sparsetrain::{name}_fwd", "default", _forward)
    torch.library.impl(f"sparsetrain::{name}_bwd", "default", _backward)

    @torch.library.register_fake(f"sparsetrain::{name}_fwd")
    def _forward_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query.dtype, torch.float32)
        return torch.empty_like(query), torch.empty(query.shape[:3], dtype=dtype, device=query.device)

    @torch.library.register_fake(f"sparsetrain::{name}_bwd")
    def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in args[before : before + trained])

    class Attention(torch.autograd.Function):
        """The forward operation with its gradient; arguments are those of the operation."""

        @staticmethod
        def forward(*args: Any) -> Any:
            return (_forward if called_plainly(*args[:trained]) else run_forward)(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.settings = inputs[tensors:]
            if not lse_gradient:
                ctx.mark_non_differentiable(output[1])
            # The log-sum-exp mostly has no gradient, and zeros in its place would cost a launch.
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:tensors], *output)

        @staticmethod
        @first_derivative_only
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
            *saved, out, lse = ctx.saved_tensors
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            results = (grad_lse, out, lse) if lse_gradient else (out, lse)
            run = _backward if called_plainly(grad_out, *saved[:trained]) else run_backward
            grads = run(grad_out, *results, *saved, *ctx.settings)
            return *grads, *[None] * (len(saved) - trained + len(ctx.settings))

    @register_flop_formula(run_forward, get_raw=True)
    def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        """Two products of ``head_dim`` for each pair of a query and a key that it sees."""
        call = inputs._make(args[:-1])
        return 4 * call.query.shape[3] * pairs(call)

    @register_flop_formula(run_backward, get_raw=True)
    def _backward_flops(grad_out: Any, *args: Any, out_val: Any = None) -> int:
        """Five products: what the gradient needs, not those that are done twice to save memory."""
        return _forward_flops(*args[before:]) * 5 // 2

    return Attention
