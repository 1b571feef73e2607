"""The operation as PyTorch knows it: two library operations, forward and backward, with their gradient and FLOP count.

They are opaque to ``torch.compile`` (one compilation for all lengths), visible to selective activation checkpointing
(``torch.ops.sparsetrain.block_pattern_fwd.default`` can be saved instead of recomputed) and to FLOP counters.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsetrain_kernels.block_pattern.pattern import BlockLists
from sparsetrain_kernels.eager import called_plainly
from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.gather import gather_backward, gather_forward, sink_gradient
from sparsetrain_kernels.inputs import AttentionInputs, Document, consecutive_rows

_SHARED = (
    "Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens, int q_start, float scale, float? softcap, "
    "Tensor? sink_logits, int block, int window, int num_sinks, int heads, int period, int[] far, int[] far_back, "
    "str backend, int workspace"
)
_INPUTS = len(AttentionInputs._fields)

torch.library.define("sparsetrain::block_pattern_fwd", f"({_SHARED}) -> (Tensor, Tensor)")
torch.library.define(
    "sparsetrain::block_pattern_bwd",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_SHARED}) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, lists, backend, _ = _unpack(args)
    if backend == "reference":
        return gather_forward(inputs, lists)
    return _launches(backend).attention_forward(inputs, lists)


def _backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, lists, backend, workspace = _unpack(args)
    if backend == "reference":
        return gather_backward(inputs, lists, grad_out, grad_lse, out, lse)
    own = (workspace,) if backend == "gluon" else ()
    return _launches(backend).attention_backward(inputs, lists, consecutive_rows(grad_out), grad_lse, out, lse, *own)


torch.library.impl("sparsetrain::block_pattern_fwd", "default", _forward)
torch.library.impl("sparsetrain::block_pattern_bwd", "default", _backward)


@cache
def _launches(backend: str) -> ModuleType:
    """The module that launches the kernels of a backend. Imported on first use: Triton may be absent."""
    folder = {"triton": "triton", "gluon": "hopper"}[backend]
    return importlib.import_module(f"sparsetrain_kernels.block_pattern.{folder}.launch")


@torch.library.register_fake("sparsetrain::block_pattern_fwd")
def _forward_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), torch.empty(query.shape[:3], dtype=dtype, device=query.device)


@torch.library.register_fake("sparsetrain::block_pattern_bwd")
def _backward_fake(
    grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(lse)


def block_pattern_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The forward operation, without a gradient."""
    return _forward(*args) if called_plainly(*args[:3]) else torch.ops.sparsetrain.block_pattern_fwd(*args)


class BlockPatternAttention(torch.autograd.Function):
    """The forward operation with its gradient; arguments are those of the operation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return block_pattern_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, cu_seqlens, *ctx.numbers, sink_logits = inputs[:_INPUTS]
        ctx.settings = inputs[_INPUTS:]
        # The log-sum-exp mostly has no gradient, and zeros in its place would cost a launch.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, cu_seqlens, sink_logits, *output)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, sink_logits, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        inputs = (*tensors, *ctx.numbers, sink_logits)
        operation = _backward if called_plainly(grad_out, *inputs[:3]) else torch.ops.sparsetrain.block_pattern_bwd
        *grads, delta = operation(grad_out, grad_lse, out, lse, *inputs, *ctx.settings)
        none = [None] * len(ctx.settings)
        return *grads, None, None, None, None, sink_gradient(sink_logits, lse, delta), *none


def _unpack(args: tuple[Any, ...]) -> tuple[AttentionInputs, BlockLists, str, int]:
    *numbers, far, far_back, backend, workspace = args[_INPUTS:]
    lists = BlockLists._make((*numbers, tuple(far), tuple(far_back)))
    return AttentionInputs._make(args[:_INPUTS]), lists, backend, workspace


@register_flop_formula(torch.ops.sparsetrain.block_pattern_fwd, get_raw=True)
def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Two products of ``head_dim`` for each visible pair of a query and a key."""
    inputs, lists, *_ = _unpack(args)
    batch, heads, _, head_dim = inputs.query.shape
    repeats = batch * heads // lists.heads
    return 4 * head_dim * repeats * sum(lists.visible_pairs(document) for document in _documents(inputs))


@register_flop_formula(torch.ops.sparsetrain.block_pattern_bwd, get_raw=True)
def _backward_flops(grad_out: Any, grad_lse: Any, out: Any, lse: Any, *args: Any, out_val: Any = None) -> int:
    """Five products: what the gradient needs, not the two that are done twice to save memory."""
    return _forward_flops(*args) * 5 // 2


def _documents(inputs: AttentionInputs) -> tuple[Document, ...]:
    """The documents of a call that is counted. Without values (on fake tensors), one document of all the tokens."""
    fake = isinstance(inputs.cu_seqlens, torch._subclasses.FakeTensor)
    return inputs._replace(cu_seqlens=None).documents() if fake else inputs.documents()
