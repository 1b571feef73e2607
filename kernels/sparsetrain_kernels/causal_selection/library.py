"""The causal selection as PyTorch knows it: two library operations, opaque to ``torch.compile``, and the gradient.

Selective activation checkpointing can save ``torch.ops.sparsetrain.causal_sparsek.default`` instead of recomputing it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.causal_selection import reference
from sparsetrain_kernels.causal_selection.selection import CausalSelection
from sparsetrain_kernels.eager import called_plainly
from sparsetrain_kernels.first_derivative import first_derivative_only

_INTEGERS = len(CausalSelection._fields) - 1

torch.library.define(
    "sparsetrain::causal_sparsek",
    "(Tensor scores, int topk, int window, int sinks, Tensor? cu_seqlens, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sparsetrain::causal_sparsek_bwd",
    "(Tensor grad_threshold, Tensor interior_start, Tensor interior_end, Tensor interior_size, str backend) -> Tensor",
)


def _forward(
    scores: Tensor, topk: int, window: int, sinks: int, cu_seqlens: Tensor | None, backend: str
) -> tuple[Tensor, ...]:
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != scores.shape[2] or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the number of tokens, {scores.shape[2]}")
    if backend == "reference":
        return tuple(reference.select(scores, topk, window, sinks, cu_seqlens))
    # On first use: Triton may be absent.
    from sparsetrain_kernels.causal_selection.triton.selection import select

    return select(scores, topk, window, sinks, cu_seqlens)


def _backward(
    grad_threshold: Tensor, interior_start: Tensor, interior_end: Tensor, interior_size: Tensor, backend: str
) -> Tensor:
    if backend == "reference":
        return reference.threshold_gradient(grad_threshold, interior_start, interior_end, interior_size)
    from sparsetrain_kernels.causal_selection.triton.gradient import threshold_gradient

    return threshold_gradient(grad_threshold, interior_start, interior_end, interior_size)


torch.library.impl("sparsetrain::causal_sparsek", "default", _forward)
torch.library.impl("sparsetrain::causal_sparsek_bwd", "default", _backward)


@torch.library.register_fake("sparsetrain::causal_sparsek")
def _forward_fake(scores: Tensor, *args: Any) -> tuple[Tensor, ...]:
    integers = [scores.new_empty(scores.shape, dtype=torch.int32) for _ in range(_INTEGERS)]
    return scores.new_empty(scores.shape), *integers


@torch.library.register_fake("sparsetrain::causal_sparsek_bwd")
def _backward_fake(grad_threshold: Tensor, *args: Any) -> Tensor:
    return grad_threshold.new_empty(grad_threshold.shape)


class CausalSparsek(torch.autograd.Function):
    """The forward operation with the gradient of the threshold; arguments are those of the operation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return (_forward if called_plainly(args[0]) else torch.ops.sparsetrain.causal_sparsek)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        selection = CausalSelection(*output)
        ctx.backend = inputs[-1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        # The threshold for its history alone.
        ctx.save_for_backward(
            selection.interior_start, selection.interior_end, selection.interior_size, selection.threshold
        )

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_threshold: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_threshold is None:
            return None, None, None, None, None, None
        run: Any = _backward if called_plainly(grad_threshold) else torch.ops.sparsetrain.causal_sparsek_bwd
        grad = run(grad_threshold, *ctx.saved_tensors[:3], ctx.backend)
        return grad, None, None, None, None, None
