"""FLOPs per token of a model and peak FLOP/s of a device, for model FLOP utilisation."""

from __future__ import annotations

import re
from typing import Any

# Dense (not 2:4 sparse) peaks in TFLOP/s from the vendors' data sheets: half precision with fp32 accumulation on tensor
# cores, and fp32 on the ordinary cores (torch does not use TF32 by default). The first pattern that matches counts.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"\bB200\b|\bGB200\b", 2250.0, 75.0),
    (r"\bH200 NVL\b", 835.0, 60.0),
    (r"\bH200\b|\bGH200\b", 989.4, 67.0),
    (r"\bH100 PCIe\b", 756.0, 51.0),
    (r"\bH100 NVL\b", 835.0, 60.0),
    (r"\bH100\b|\bH800\b", 989.4, 67.0),
    (r"\bH20\b", 148.0, 44.0),
    (r"\bA100\b|\bA800\b", 312.0, 19.5),
    (r"\bL40S\b", 362.0, 91.6),
    (r"\bL40\b", 181.0, 90.5),
    (r"\bL4\b", 121.0, 30.3),
    (r"\bA40\b", 149.7, 37.4),
    (r"\bA10\b", 125.0, 31.2),
    (r"\bRTX A6000\b", 154.8, 38.7),
    (r"\bRTX 5090\b", 209.5, 104.8),
    (r"\bRTX 4090\b", 165.2, 82.6),
    (r"\bRTX 3090\b", 71.0, 35.6),
    (r"\bMI300X\b", 1307.4, 163.4),
)


def model_flops_per_token(
    num_params: int, layers: int, heads: int, head_dim: int, mean_visible_keys: float, frozen_params: int = 0
) -> float:
    """Floating-point operations to train on one token: forward, and backward with twice as many.

    Half of the backward pass computes gradients of weights, which frozen ones do not need.

    Recomputation to save memory (activation checkpointing) is not counted: utilisation measures the operations that the
    model needs, not those that the run performs.

    Args:
        num_params: Parameters of matrix products. Leave the input embedding out unless it is also the output
            projection: a lookup is not a product.
        layers: Decoder layers.
        heads: Query heads.
        head_dim: Dimension of a head.
        mean_visible_keys: Keys that a query attends to, averaged over queries and layers; with block patterns, those in
            visible tiles. Full causal attention over ``T`` tokens has ``(T + 1) / 2``.
        frozen_params: Number of parameters that are not trained.
    """
    matrices = 2 * num_params
    attention = 4 * layers * heads * head_dim * mean_visible_keys  # query times key, then weights times value
    return 3.0 * (matrices + attention) - 2.0 * min(frozen_params, num_params)


def peak_flops(device_name: str, dtype: Any) -> float | None:
    """Peak FLOP/s of a device; None if it is not known (CPUs, laptop GPUs, slices of a GPU, fp64).

    Args:
        device_name: The result of ``torch.cuda.get_device_name``, such as ``NVIDIA H100 80GB HBM3``.
        dtype: A torch dtype or its name.
    """
    column = {"bfloat16": 1, "float16": 1, "float32": 2}.get(str(dtype).removeprefix("torch."))
    if column is None or re.search(r"\bMIG\b|Laptop|Max-Q", device_name):
        return None
    for row in _PEAKS:
        if re.search(row[0], device_name):
            return float(row[column]) * 1e12
    return None
