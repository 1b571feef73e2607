"""Attention over a selection as PyTorch knows it (:mod:`sparsetrain_kernels.attention_library`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from sparsetrain_kernels.attention_library import define_attention
from sparsetrain_kernels.selected_keys.gathered import gathered_backward, gathered_forward
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs


def _forward(backend: str) -> Callable[..., Any]:
    return gathered_forward if backend == "reference" else _launches(backend).attention_forward


def _backward(backend: str) -> Callable[..., Any]:
    return gathered_backward if backend == "reference" else _launches(backend).attention_backward


@cache
def _launches(backend: str) -> ModuleType:
    """The module that launches the kernels of a backend. Imported on first use: Triton may be absent."""
    folder = {"triton": "triton", "gluon": "hopper"}[backend]
    return importlib.import_module(f"sparsetrain_kernels.selected_keys.{folder}.launch")


def _pairs(inputs: SelectedInputs) -> int:
    """Without values (on fake tensors), of one document of all the tokens."""
    batch, heads, _, _ = inputs.query.shape
    fake = isinstance(inputs.cu_seqlens, torch._subclasses.FakeTensor)
    documents = (inputs._replace(cu_seqlens=None) if fake else inputs).documents()
    budget = inputs.sinks + inputs.topk + inputs.window
    return batch * heads * sum(_pairs_seen(document.rows, budget) for document in documents)


def _pairs_seen(rows: int, budget: int) -> int:
    """Row ``i`` of a document sees ``min(i + 1, budget)`` keys."""
    filling = min(rows, budget)
    return filling * (filling + 1) // 2 + (rows - filling) * budget


SelectedAttention = define_attention(
    "selected",
    "Tensor query, Tensor key, Tensor value, Tensor scores, Tensor threshold, Tensor exit, Tensor? cu_seqlens, "
    "float scale, SymInt topk, SymInt window, SymInt sinks, str gate, str backend",
    SelectedInputs,
    forward=_forward,
    backward=_backward,
    pairs=_pairs,
    trained=5,
    lse_gradient=False,
)
