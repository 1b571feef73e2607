"""Causal attention of chosen rows as PyTorch knows it (:mod:`sparsetrain_kernels.attention_library`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from sparsetrain_kernels.attention_library import define_attention
from sparsetrain_kernels.dense.row_inputs import RowInputs
from sparsetrain_kernels.dense.row_reference import pairs_seen, row_backward, row_forward


def _forward(backend: str) -> Callable[..., Any]:
    # The Hopper kernels are of the backward pass.
    return row_forward if backend == "reference" else _launches("triton").rows_forward


def _backward(backend: str) -> Callable[..., Any]:
    return row_backward if backend == "reference" else _launches(backend).rows_backward


@cache
def _launches(backend: str) -> ModuleType:
    """The module that launches the kernels of a backend. Imported on first use: Triton may be absent."""
    folder = {"triton": "triton", "gluon": "hopper"}[backend]
    return importlib.import_module(f"sparsetrain_kernels.dense.{folder}.launch")


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
