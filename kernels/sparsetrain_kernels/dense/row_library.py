"""Causal attention of chosen rows as PyTorch knows it (:mod:`sparsetrain_kernels.attention_library`)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from sparsetrain_kernels.attention_library import define_attention
from sparsetrain_kernels.dense.row_inputs import RowInputs
from sparsetrain_kernels.dense.row_reference import pairs_seen, row_backward, row_forward


def _forward(backend: str) -> Callable[..., Any]:
    return row_forward if backend == "reference" else _launches().rows_forward


def _backward(backend: str) -> Callable[..., Any]:
    return row_backward if backend == "reference" else _launches().rows_backward


def _launches() -> ModuleType:
    """The module that launches the kernels. Imported on first use: Triton may be absent."""
    from sparsetrain_kernels.dense.triton import launch

    return launch


def _pairs(inputs: RowInputs) -> int:
    batch, heads, _, _ = inputs.query.shape
    return batch * heads * pairs_seen(inputs)


CausalRows = define_attention(
    "causal_rows",
    "Tensor query, Tensor key, Tensor value, Tensor query_positions, Tensor? cu_seqlens, float scale, str backend",
    RowInputs,
    forward=_forward,
    backward=_backward,
    pairs=_pairs,
)
