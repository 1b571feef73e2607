"""Rows that attention over lists skips leave the queries and join the output without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from listed_cases import make_case
from sparsetrain_kernels import causal_attention, listed_attention, put_rows, take_rows
from torch import Tensor

TOKENS, SEGMENT = 90, 9
STARTS = torch.arange(0, TOKENS, SEGMENT)


def attend(dtype: torch.dtype, take: Callable[..., Any], put: Callable[..., Any]) -> tuple[Tensor, ...]:
    """Output and gradients where the first row of each segment attends to everything before it."""
    case = make_case(tokens=TOKENS, sizes=(SEGMENT,), skip=1, dtype=dtype)
    query, key, value = leaves = [tensor.detach().requires_grad_() for tensor in case.trained]
    others, rows = take(query, STARTS)
    full = causal_attention(rows, key, value, query_positions=STARTS.int())
    out = put(listed_attention(others, key, value, *case.lists, **case.options), STARTS, full)
    return out, *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_copies(dtype: torch.dtype) -> None:
    ours = attend(dtype, take_rows, put_rows)
    copies = attend(dtype, lambda query, rows: (query, query[:, :, rows]), lambda out, *rest: out.index_copy(2, *rest))
    for one, other in zip(ours, copies, strict=True):
        assert torch.equal(one, other)


def test_what_they_return_lies_in_the_same_memory() -> None:
    query, out = torch.randn(1, 2, TOKENS, 4, requires_grad=True), torch.zeros(1, 2, TOKENS, 4)
    others, rows = take_rows(query, STARTS)
    assert others.data_ptr() == query.data_ptr()
    merged = put_rows(out, STARTS, rows)
    assert merged.data_ptr() == out.data_ptr()
    assert torch.equal(merged[:, :, STARTS], rows)


@pytest.mark.parametrize("used", [0, 1])
def test_either_may_go_without_a_gradient(used: int) -> None:
    query = torch.randn(1, 2, TOKENS, 4, requires_grad=True)
    take_rows(query, STARTS)[used].sum().backward()
    expected = torch.ones_like(query) if used == 0 else torch.zeros_like(query).index_fill(2, STARTS, 1)
    assert torch.equal(query.grad, expected)


def test_a_second_derivative_is_refused() -> None:
    query = torch.randn(1, 2, TOKENS, 4, requires_grad=True)
    others, rows = take_rows(query, STARTS)
    (grad,) = torch.autograd.grad((others.square().sum() + rows.square().sum()), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"out": torch.zeros(2, TOKENS, 4)}, r"out has shape \(2, 90, 4\), expected"),
        ({"rows": STARTS.int()}, "rows has dtype torch.int32, expected torch.int64"),
        ({"rows": STARTS[None]}, r"rows has shape \(1, 10\), expected one dimension"),
        (
            {"values": torch.zeros(1, 2, 9, 4)},
            r"values is torch.float32 \(1, 2, 9, 4\), expected torch.float32 \(1, 2, 10, 4\)",
        ),
        ({"values": torch.zeros(1, 2, 10, 4).double()}, "values is torch.float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(wrong: dict[str, Tensor], named: str) -> None:
    right = {"out": torch.zeros(1, 2, TOKENS, 4), "rows": STARTS, "values": torch.zeros(1, 2, 10, 4)}
    with pytest.raises((TypeError, ValueError), match=named):
        put_rows(**{**right, **wrong})
