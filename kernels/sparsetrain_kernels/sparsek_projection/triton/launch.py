"""Launches the kernels. Nothing is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.inputs import consecutive_rows
from sparsetrain_kernels.launching import launch, next_power_of_2, on_device
from sparsetrain_kernels.sparsek_projection.triton import kernels

HELD = 8192
"""The longest row that a program keeps in registers."""
BLOCK = 4096
"""Entries of a longer row that it reads at a time."""


def project(z: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`sparsetrain_kernels.sparsek_projection.reference.project`, by bisection."""
    rows, entries = z.shape
    p = torch.empty((rows, entries), dtype=z.dtype, device=z.device)
    tau = torch.empty(rows, dtype=torch.float32, device=z.device)
    rest = torch.empty_like(tau)
    with on_device(z):
        launch(
            kernels.sparsek_fwd_kernel,
            rows,
            (z, k, p, tau, rest),
            (
                entries,
                z.stride(0),
                k.stride(0),
            ),
            **tile(entries),
        )
    return p, tau, rest


def project_backward(grad: Tensor, z: Tensor, tau: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`sparsetrain_kernels.sparsek_projection.reference.project_backward`."""
    rows, entries = z.shape
    grad = consecutive_rows(grad)
    grad_z = torch.empty((rows, entries), dtype=z.dtype, device=z.device)
    grad_k = torch.empty_like(tau)
    with on_device(z):
        launch(
            kernels.sparsek_bwd_kernel,
            rows,
            (grad, z, tau, rest, grad_z, grad_k),
            (
                entries,
                grad.stride(0),
                z.stride(0),
            ),
            **tile(entries),
        )
    return grad_z, grad_k


def tile(entries: int) -> dict[str, int | bool]:
    """How a program takes a row of so many entries."""
    held = entries <= HELD
    block = next_power_of_2(entries) if held else BLOCK
    return {"BLOCK": block, "HELD": held, "num_warps": 4 if block <= 2048 else 8}
