"""Attention over lists as PyTorch knows it (:mod:`sparsetrain_kernels.attention_library`)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from sparsetrain_kernels.attention_library import define_attention
from sparsetrain_kernels.listed_keys.gathered import gathered_backward, gathered_forward, pairs_seen
from sparsetrain_kernels.listed_keys.inputs import ListedInputs


def _forward(backend: str) -> Callable[..., Any]:
    return gathered_forward if backend == "reference" else _launches().attention_forward


def _backward(backend: str) -> Callable[..., Any]:
    return gathered_backward if backend == "reference" else _launches().attention_backward


def _launches() -> ModuleType:
    """The module that launches the kernels. Imported on first use: Triton may be absent."""
    from sparsetrain_kernels.listed_keys.triton import launch

    return launch


def _pairs(inputs: ListedInputs) -> int:
    return inputs.query.shape[1] // inputs.key.shape[1] * pairs_seen(inputs)


ListedAttention = define_attention(
    "listed",
    "Tensor query, Tensor key, Tensor value, Tensor lists, Tensor counts, Tensor cu_segments, Tensor skip, "
    "Tensor? cu_seqlens, float scale, SymInt window, SymInt sinks, SymInt granule, str backend",
    ListedInputs,
    forward=_forward,
    backward=_backward,
    pairs=_pairs,
)
