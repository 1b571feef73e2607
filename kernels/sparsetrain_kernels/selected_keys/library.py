"""The operation as PyTorch knows it: two library operations, forward and backward, with their gradient and FLOP count.

They are opaque to ``torch.compile`` (one compilation for all lengths and budgets), visible to selective activation
checkpointing (``torch.ops.sparsetrain.selected_fwd.default`` can be saved instead of recomputed) and to FLOP counters.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.inputs import consecutive_rows
from sparsetrain_kernels.selected_keys.gathered import gathered_backward, gathered_forward
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs

_SHARED = (
    "Tensor query, Tensor key, Tensor value, Tensor scores, Tensor threshold, Tensor exit, Tensor? cu_seqlens, "
    "float scale, SymInt topk, SymInt window, SymInt sinks, str gate, str backend"
)
_TENSORS = SelectedInputs._fields.index("scale")
_TRAINED = SelectedInputs._fields.index("exit")

torch.library.define("sparsetrain::selected_fwd", f"({_SHARED}) -> (Tensor, Tensor)")
torch.library.define(
    "sparsetrain::selected_bwd",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_SHARED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("sparsetrain::selected_fwd", "default")
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = SelectedInputs._make(args[:-1]), args[-1]
    return gathered_forward(inputs) if backend == "reference" else _launches().attention_forward(inputs)


@torch.library.impl("sparsetrain::selected_bwd", "default")
def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, backend = SelectedInputs._make(args[:-1]), args[-1]
    if backend == "reference":
        return gathered_backward(inputs, grad_out, out, lse)
    return _launches().attention_backward(inputs, consecutive_rows(grad_out), out, lse)


def _launches() -> ModuleType:
    """The module that launches the kernels. Imported on first use: Triton may be absent."""
    from sparsetrain_kernels.selected_keys.triton import launch

    return launch


@torch.library.register_fake("sparsetrain::selected_fwd")
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty(query.shape[:3], dtype=scores.dtype, device=query.device)


@torch.library.register_fake("sparsetrain::selected_bwd")
def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in args[:_TRAINED])


class SelectedAttention(torch.autograd.Function):
    """The forward operation with its gradient; arguments are those of the operation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.sparsetrain.selected_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = inputs[_TENSORS:]
        ctx.mark_non_differentiable(output[1])
        # The log-sum-exp has no gradient, and zeros in its place would cost a launch.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSORS], *output)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        none = [None] * (len(inputs) - _TRAINED + len(ctx.settings))
        if grad_out is None:
            return *(None for _ in inputs[:_TRAINED]), *none
        return *torch.ops.sparsetrain.selected_bwd(grad_out, out, lse, *inputs, *ctx.settings), *none


@register_flop_formula(torch.ops.sparsetrain.selected_fwd, get_raw=True)
def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Two products of ``head_dim`` for each pair of a query and a key that it sees."""
    inputs = SelectedInputs._make(args[:-1])
    batch, heads, _, head_dim = inputs.query.shape
    # Without values (on fake tensors), one document of all the tokens.
    fake = isinstance(inputs.cu_seqlens, torch._subclasses.FakeTensor)
    documents = (inputs._replace(cu_seqlens=None) if fake else inputs).documents()
    budget = inputs.sinks + inputs.topk + inputs.window
    return 4 * head_dim * batch * heads * sum(_pairs_seen(document.rows, budget) for document in documents)


@register_flop_formula(torch.ops.sparsetrain.selected_bwd, get_raw=True)
def _backward_flops(grad_out: Any, out: Any, lse: Any, *args: Any, out_val: Any = None) -> int:
    """Five products: what the gradient needs, not the two that are done twice to save memory."""
    return _forward_flops(*args) * 5 // 2


def _pairs_seen(rows: int, budget: int) -> int:
    """Row ``i`` of a document sees ``min(i + 1, budget)`` keys."""
    filling = min(rows, budget)
    return filling * (filling + 1) // 2 + (rows - filling) * budget
