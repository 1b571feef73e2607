"""Calls of attention over a selection, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from attention_oracle import FLOOR, make_inputs, worst_error
from selected_oracle import Selection, select
from sparsetrain_kernels import (
    selected_attention_dense,
)
from torch import Tensor

GATES = ("value", "log", "straight")
PACKED = (0, 1, 12, 30, 30, 110, 177)
NAMES = ("out", "lse", "grad query", "grad key", "grad value", "grad scores", "grad threshold")
FORWARD = torch.ops.sparsetrain.selected_fwd.default
BACKWARD = torch.ops.sparsetrain.selected_bwd.default
KERNELS = "sparsetrain_kernels.selected_keys.triton"


class Case(NamedTuple):
    """The arguments of one call: ``query, key, value, scores, threshold``, then ``exit``, then the options."""

    trained: tuple[Tensor, ...]
    exit: Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Case:
        """Query, key and value in ``dtype``; scores and threshold in fp32, or fp64."""
        wide = torch.promote_types(dtype, torch.float32)
        query, key, value, scores, threshold = (tensor.detach() for tensor in self.trained)
        return self._replace(
            trained=(query.to(dtype), key.to(dtype), value.to(dtype), scores.to(wide), threshold.to(wide))
        )

    def leaves(self) -> list[Tensor]:
        return [tensor.detach().requires_grad_() for tensor in self.trained]


def make_case(
    query_heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 177,
    *,
    window: int = 20,
    topk: int = 12,
    sinks: int = 3,
    gate: str = "value",
    bounds: tuple[int, ...] | None = None,
    shared: bool = False,
    spread: float = 0.5,
    **options: Any,
) -> Case:
    """Random tensors and scores of standard deviation ``spread``, whose selection an oracle makes."""
    query, key, value = make_inputs(query_heads, kv_heads, tokens, **options)
    wide = torch.promote_types(query.dtype, torch.float32)
    shape = (query.shape[0], 1 if shared else kv_heads, tokens)
    selection = random_selection(shape, spread, wide, topk, window, sinks, bounds or (0, tokens))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    options = {"window": window, "topk": topk, "sinks": sinks, "gate": gate, "cu_seqlens": cu_seqlens}
    return Case((query, key, value, *selection[:2]), selection.exit, options)


@cache
def random_selection(
    shape: tuple[int, ...],
    spread: float,
    dtype: torch.dtype,
    topk: int,
    window: int,
    sinks: int,
    bounds: tuple[int, ...],
) -> Selection:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * spread
    return select(scores.to(dtype), topk, window, sinks, list(bounds))


def outputs_and_gradients(attention: Callable[..., tuple[Tensor, Tensor]], case: Case) -> list[Tensor]:
    """``out``, ``lse`` and the five gradients under a fixed random gradient of ``out``."""
    leaves = case.leaves()
    out, lse = attention(*leaves, case.exit, **case.options)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def assert_equals_the_definition(attention: Callable[..., tuple[Tensor, Tensor]], case: Case) -> None:
    """Within twice the error that the definition itself makes in the case's dtype, both measured against fp64."""
    dtype = case.trained[0].dtype
    exact = outputs_and_gradients(selected_attention_dense, case.to(torch.float64))
    eager = outputs_and_gradients(selected_attention_dense, case)
    actual = outputs_and_gradients(attention, case)
    for name, ours, yardstick, truth in zip(NAMES, actual, eager, exact, strict=True):
        # One number a token: a sum of many terms that cancel, with nothing to average the rounding over.
        floor = FLOOR[dtype] * (1 if truth.dim() == 4 else 3)
        if not truth.any():
            assert ours.abs().max() <= floor, f"{name} is zero"
            continue
        limit = max(2 * worst_error(yardstick, truth), floor)
        assert worst_error(ours, truth) <= limit, f"{name}: {worst_error(ours, truth):.2e} > {limit:.2e}"
