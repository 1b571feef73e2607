"""SPARSEK of the rows of a matrix as PyTorch knows it: two library operations and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.sparsek_projection import reference

torch.library.define(
    "sparsetrain::sparsek_fwd", "(Tensor z, Tensor k, str method, str backend) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "sparsetrain::sparsek_bwd",
    "(Tensor grad, Tensor z, Tensor tau, Tensor rest, str backend) -> (Tensor, Tensor)",
)


@torch.library.impl("sparsetrain::sparsek_fwd", "default")
def _forward(z: Tensor, k: Tensor, method: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference.project(z, k, method)
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.sparsek_projection.triton.launch import project

    return project(z, k)


@torch.library.impl("sparsetrain::sparsek_bwd", "default")
def _backward(grad: Tensor, z: Tensor, tau: Tensor, rest: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.project_backward(grad, z, tau, rest)
    from sparsetrain_kernels.sparsek_projection.triton.launch import project_backward

    return project_backward(grad, z, tau, rest)


@torch.library.register_fake("sparsetrain::sparsek_fwd")
def _forward_fake(z: Tensor, k: Tensor, method: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(z.dtype, torch.float32)
    rows = z.shape[:1]
    return z.new_empty(z.shape), z.new_empty(rows, dtype=dtype), z.new_empty(rows, dtype=dtype)


@torch.library.register_fake("sparsetrain::sparsek_bwd")
def _backward_fake(grad: Tensor, z: Tensor, tau: Tensor, rest: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(tau)


class Sparsek(torch.autograd.Function):
    """The forward operation with the gradients of ``z`` and ``k``; arguments are those of the operation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.sparsetrain.sparsek_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, k, _, ctx.backend = inputs
        _, tau, rest = output
        ctx.k_dtype = k.dtype
        ctx.mark_non_differentiable(tau, rest)
        ctx.save_for_backward(z, tau, rest)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_z, grad_k = torch.ops.sparsetrain.sparsek_bwd(grad, *ctx.saved_tensors, ctx.backend)
        return grad_z, grad_k.to(ctx.k_dtype), None, None
