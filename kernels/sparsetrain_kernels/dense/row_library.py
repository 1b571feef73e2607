"""Causal attention of chosen rows as PyTorch knows it: two library operations, with their gradient and FLOP count."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsetrain_kernels.dense.row_inputs import RowInputs
from sparsetrain_kernels.dense.row_reference import pairs_seen, row_backward, row_forward
from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.inputs import consecutive_rows

_SHARED = "Tensor query, Tensor key, Tensor value, Tensor query_positions, Tensor? cu_seqlens, float scale, str backend"
_TENSORS = RowInputs._fields.index("scale")
_TRAINED = RowInputs._fields.index("query_positions")

torch.library.define("sparsetrain::causal_rows_fwd", f"({_SHARED}) -> (Tensor, Tensor)")
torch.library.define(
    "sparsetrain::causal_rows_bwd",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_SHARED}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("sparsetrain::causal_rows_fwd", "default")
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = RowInputs._make(args[:-1]), args[-1]
    return row_forward(inputs) if backend == "reference" else _launches().rows_forward(inputs)


@torch.library.impl("sparsetrain::causal_rows_bwd", "default")
def _backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, backend = RowInputs._make(args[:-1]), args[-1]
    if backend == "reference":
        return row_backward(inputs, grad_out, grad_lse, out, lse)
    return _launches().rows_backward(inputs, consecutive_rows(grad_out), grad_lse, out, lse)


def _launches() -> ModuleType:
    """The module that launches the kernels. Imported on first use: Triton may be absent."""
    from sparsetrain_kernels.dense.triton import launch

    return launch


@torch.library.register_fake("sparsetrain::causal_rows_fwd")
def _forward_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), torch.empty(query.shape[:3], dtype=dtype, device=query.device)


@torch.library.register_fake("sparsetrain::causal_rows_bwd")
def _backward_fake(grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in args[:_TRAINED])


class CausalRows(torch.autograd.Function):
    """The forward operation with its gradient; arguments are those of the operation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.sparsetrain.causal_rows_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[_TENSORS:]
        # The log-sum-exp mostly has no gradient, and zeros in its place would cost a launch.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSORS], *output)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = torch.ops.sparsetrain.causal_rows_bwd(grad_out, grad_lse, out, lse, *inputs, *ctx.settings)
        return *grads, *[None] * (len(inputs) - _TRAINED + len(ctx.settings))


@register_flop_formula(torch.ops.sparsetrain.causal_rows_fwd, get_raw=True)
def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Two products of ``head_dim`` for each pair of a query and a key that it sees."""
    inputs = RowInputs._make(args[:-1])
    batch, heads, _, head_dim = inputs.query.shape
    return 4 * head_dim * batch * heads * pairs_seen(inputs)


@register_flop_formula(torch.ops.sparsetrain.causal_rows_bwd, get_raw=True)
def _backward_flops(grad_out: Any, grad_lse: Any, out: Any, lse: Any, *args: Any, out_val: Any = None) -> int:
    """Five products: what the gradient needs, not those that are done twice to save memory."""
    return _forward_flops(*args) * 5 // 2
