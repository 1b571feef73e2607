"""Launches the backward pass on Hopper: the gradient of queries in plain Triton, that of keys and values in Gluon."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.block_pattern.hopper.descriptors import line, tiles
from sparsetrain_kernels.dense.hopper.grad_key_value import ALIGNED, causal_rows_bwd_dkv_hopper_kernel
from sparsetrain_kernels.dense.row_inputs import RowInputs
from sparsetrain_kernels.dense.triton.launch import grad_rows, key_tiles
from sparsetrain_kernels.launching import launch, on_device
from sparsetrain_kernels.row_statistics import row_statistics

KEYS = 128
"""Of a program: 64 for each warpgroup."""
ROWS = 64
"""A step."""
STAGES = 4
LOG2E = 1.4426950408889634


def rows_backward(
    inputs: RowInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out like them."""
    with on_device(inputs.query):
        statistics = row_statistics(out, grad_out, lse, grad_lse)
        return grad_rows(inputs, grad_out, statistics), *_grad_keys(inputs, grad_out, statistics)


def _grad_keys(inputs: RowInputs, grad_out: Tensor, statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    query, key, value, positions = inputs[:4]
    batch, kv_heads = key.shape[:2]
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    table = key_tiles(inputs, KEYS)
    padding = -query.shape[2] % ALIGNED.value
    if padding:
        statistics = F.pad(statistics[0], (0, padding)), F.pad(statistics[1], (0, padding))
    launch(
        causal_rows_bwd_dkv_hopper_kernel,
        table.shape[0] * kv_heads * batch,
        (
            tiles(query, ROWS),
            tiles(key, KEYS // 2),
            tiles(value, KEYS // 2),
            tiles(grad_out, ROWS),
            *(line(statistic, ROWS) for statistic in statistics),
            grad_key,
            grad_value,
            positions,
            table,
        ),
        (
            *grad_key.stride()[:3],
            *grad_value.stride()[:3],
            query.shape[2] + padding,
            table.shape[0],
            kv_heads,
            query.shape[1] // kv_heads,
            inputs.scale * LOG2E,
        ),
        BLOCK_M=ROWS,
        STAGES=STAGES,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return grad_key, grad_value
