"""Rows that attention over lists skips, because other attention computes them: how they leave the queries and join the
output, without a copy of either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.first_derivative import first_derivative_only


def take_rows(query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The queries for :func:`listed_attention`, and those of rows that it skips (2411.05787, section 6).

    As ``query, query[:, :, rows]``, but the gradients of the two are not added: the first has zeros where the second
    goes, and receives it in place.

    Args:
        query: ``[B, Hq, N, D]``.
        rows: int64 ``[P]``, each row once.

    Returns:
        ``[B, Hq, N, D]``, to be read by one :func:`listed_attention` that skips ``rows`` and by nothing else, and a
        copy ``[B, Hq, P, D]``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    _check("query", query, rows)
    return _Take.apply(query, rows)


def put_rows(out: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """The output of :func:`listed_attention`, and that of rows which it skips (2411.05787, section 6).

    As ``out.index_copy(2, rows, values)``, but the gradient of ``out`` has those rows' too, which attention over lists
    does not look at.

    Args:
        out: ``[B, Hq, N, D]``, of a :func:`listed_attention` that skips ``rows``. Changed.
        rows: int64 ``[P]``, each row once.
        values: ``[B, Hq, P, D]``.

    Returns:
        ``out [B, Hq, N, D]``, in the same memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    _check("out", out, rows)
    expected = (*out.shape[:2], rows.shape[0], out.shape[3])
    if values.shape != expected or values.dtype != out.dtype:
        raise ValueError(f"values is {values.dtype} {tuple(values.shape)}, expected {out.dtype} {expected}")
    return _Put.apply(out, rows, values)


def _check(name: str, tensor: Tensor, rows: Tensor) -> None:
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [B, Hq, N, D]")
    if rows.dtype != torch.int64:
        raise TypeError(f"rows has dtype {rows.dtype}, expected torch.int64")
    if rows.dim() != 1:
        raise ValueError(f"rows has shape {tuple(rows.shape)}, expected one dimension")


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return query.view_as(query), query.index_select(2, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.shape = inputs[0].shape
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_query: Tensor | None, grad_rows: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_rows is None:
            return grad_query, None
        if grad_query is None:
            grad_query = grad_rows.new_zeros(ctx.shape)
        return grad_query.index_copy_(2, ctx.saved_tensors[0], grad_rows), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(out: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        # Attention over lists has saved its output, and autograd would refuse one that has changed since. Its backward
        # pass reads nothing of rows that it skips.
        out.data.index_copy_(2, rows, values)
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        return grad, None, grad.index_select(2, ctx.saved_tensors[0])
