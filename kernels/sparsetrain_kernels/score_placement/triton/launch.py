"""Launches the kernels that normalise scores. Nothing is read on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device
from sparsetrain_kernels.score_placement.reference import EPSILON
from sparsetrain_kernels.score_placement.triton import kernels

BLOCK = 2048
"""Tokens that a program takes at a time."""
PAIRS = 32
"""Heads of all rows that a program takes where there is one token a row."""


def place_scores(
    linear: Tensor, gain: Tensor, position: Tensor, first: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores like ``linear``, and the running sums of the scores and of their squares, fp64; all ``[B, heads, N]``."""
    batch, heads, tokens = linear.shape
    scores = torch.empty(linear.shape, dtype=linear.dtype, device=linear.device)
    total, squares = (torch.empty(linear.shape, dtype=torch.float64, device=linear.device) for _ in range(2))
    with on_device(linear):
        launch(
            kernels.placement_fwd_kernel,
            batch * heads,
            (linear, gain, position, first, scores, total, squares),
            (
                *linear.stride(),
                *gain.stride(),
                tokens,
            ),
            SLOPE=slope,
            **_shape(linear),
        )
    return scores, total, squares


def place_next_score(
    linear: Tensor, gain: Tensor, position: Tensor, total: Tensor, squares: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores like ``linear``, ``[B, heads, 1]``, of the tokens at ``position``, int64 ``[B, 1]``, and the moments with
    them, fp64 ``[B, heads]`` each; ``total`` and ``squares`` are those before."""
    batch, heads, _ = linear.shape
    scores = torch.empty(linear.shape, dtype=linear.dtype, device=linear.device)
    after, squares_after = torch.empty_like(total), torch.empty_like(squares)
    with on_device(linear):
        launch(
            kernels.next_score_kernel,
            cdiv(batch * heads, PAIRS),
            (linear, gain, position, total, squares, scores, after, squares_after),
            (*linear.stride()[:2], *gain.stride()[:2], position.stride(0), batch * heads),
            SLOPE=slope,
            HEADS=heads,
            EPSILON=EPSILON,
            BLOCK=PAIRS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return scores, after, squares_after


def place_scores_backward(
    grad: Tensor, linear: Tensor, gain: Tensor, position: Tensor, first: Tensor, total: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``linear`` and ``gain``, ``[B, heads, N]`` each."""
    batch, heads, tokens = linear.shape
    grad_linear = torch.empty(linear.shape, dtype=linear.dtype, device=linear.device)
    grad_gain = torch.empty(linear.shape, dtype=gain.dtype, device=linear.device)
    with on_device(linear):
        launch(
            kernels.placement_bwd_kernel,
            batch * heads,
            (grad, linear, gain, position, first, total, squares, grad_linear, grad_gain),
            (
                *grad.stride(),
                *linear.stride(),
                *gain.stride(),
                tokens,
            ),
            **_shape(linear),
        )
    return grad_linear, grad_gain


def _shape(linear: Tensor) -> dict[str, Any]:
    block = min(BLOCK, next_power_of_2(linear.shape[2]))
    # Products and sums are rounded one by one, as in plain PyTorch.
    return {
        "HEADS": linear.shape[1],
        "EPSILON": EPSILON,
        "BLOCK": block,
        "num_warps": 8 if block >= 1024 else 4,
        "enable_fp_fusion": False,
    }
