"""Launches the gradient of thresholds. Nothing is read on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.causal_selection.triton import gradient_kernels as kernels
from sparsetrain_kernels.inputs import row_major
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device

BLOCK = 1024
"""Rows or keys that a program takes at a time."""
PARTS = 256
"""Programs that look for the largest gradient of a key, at most."""


def threshold_gradient(
    grad_threshold: Tensor, interior_start: Tensor, interior_end: Tensor, interior_size: Tensor
) -> Tensor:
    """As :func:`sparsetrain_kernels.causal_selection.reference.threshold_gradient`."""
    grad_threshold, interior_start, interior_end, interior_size = row_major(
        grad_threshold, interior_start, interior_end, interior_size
    )
    total, tokens = grad_threshold.numel(), grad_threshold.shape[2]
    blocks = cdiv(total, BLOCK)
    sizes: dict[str, Any] = {
        "PARTS": min(PARTS, next_power_of_2(blocks)),
        "BLOCK": BLOCK,
        "enable_fp_fusion": False,
    }
    # A power of two, which numbers of 32 bits hold.
    to_unit = 2.0 ** -(62 - tokens.bit_length())
    largest = torch.empty(sizes["PARTS"], dtype=torch.int64, device=grad_threshold.device)
    steps = torch.empty(total + 1, dtype=torch.int64, device=grad_threshold.device)
    grad_scores = torch.empty_like(grad_threshold)
    with on_device(grad_threshold):
        launch(
            kernels.gradient_largest_kernel, sizes["PARTS"], (grad_threshold, interior_size, largest), (total,), **sizes
        )
        launch(
            kernels.gradient_steps_kernel,
            blocks,
            (grad_threshold, interior_size, largest, steps),
            (total, to_unit),
            **sizes,
        )
        launch(
            kernels.gradient_collect_kernel,
            blocks,
            (steps.cumsum(0), interior_start, interior_end, largest, grad_scores),
            (total, tokens, to_unit),
            **sizes,
        )
    return grad_scores
