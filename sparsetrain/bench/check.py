"""Check that implementations agree in outputs and gradients, before they are timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sparsetrain_kernels import causal_attention_dense
from torch import Tensor

from sparsetrain.bench.contenders.base import Prepared
from sparsetrain.bench.problem import CausalProblem, Tensors

ROWS = 128
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error that is still rounding; TF32 in fp32. One missing tile of 128 x 128 makes far more."""


class Answer(NamedTuple):
    """An output and its gradients, each ``[batch, heads, tokens, head_dim]``."""

    out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor | None = None
    """``[batch, kv_heads, tokens]``, of an implementation that selects by them."""


@dataclass(frozen=True)
class Check:
    """One implementation compared at one length."""

    name: str
    length: int
    against: str
    tolerance: float
    errors: tuple[float, ...] = ()
    """Relative RMS errors of the output and of the gradients of query, key and value, each in its worst 128 rows, and
    of the gradient of the scores where there are some."""
    reason: str = ""
    """Why there are no errors."""

    @property
    def passed(self) -> bool:
        """Whether every error is rounding; a NaN is not."""
        return bool(self.errors) and all(error <= self.tolerance for error in self.errors)

    @property
    def summary(self) -> str:
        """The comparison in a few words, for the log."""
        if not self.errors:
            return self.reason
        errors = ", ".join(f"{error:.1e}" for error in self.errors)
        return f"{'passed' if self.passed else 'failed'} against {self.against}: {errors}"


def answer(prepared: Prepared, tensors: Tensors) -> Answer:
    """Run an implementation once, forward and backward."""
    inputs, upstream = prepared.leaves(tensors)
    out = prepared.attend(*inputs)
    gradients = torch.autograd.grad(out, inputs, upstream)
    out, query, key, value = (prepared.layout.restore(tensor) for tensor in (out.detach(), *gradients[:3]))
    if prepared.repeat > 1:
        key, value = (tensor.unflatten(1, (-1, prepared.repeat)).sum(2) for tensor in (key, value))
    return Answer(out, query, key, value, *gradients[3:])


def oracle(problem: CausalProblem, tensors: Tensors, sparse: bool) -> Answer:
    """The reference in fp32 with the full mask, for short lengths only."""
    scores = [tensors.scores] if sparse and tensors.scores is not None else []
    inputs = [tensor.detach().float().requires_grad_() for tensor in (*tensors[:3], *scores)]
    if sparse:
        out = problem.definition(*inputs)
    else:
        out, _ = causal_attention_dense(*inputs, cu_seqlens=problem.cu_seqlens())
    return Answer(out.detach(), *torch.autograd.grad(out, inputs, tensors.upstream.float()))


def relative_errors(got: Answer, want: Answer) -> tuple[float, ...]:
    """The relative error of each tensor. That of the scores is of all rows together: keys that few queries can select
    have gradients of nearly nothing."""
    errors = tuple(relative_error(*pair) for pair in zip(got[:4], want[:4], strict=True))
    if got.scores is None or want.scores is None:
        return errors
    return *errors, relative_error(got.scores, want.scores, rows=want.scores.shape[2])


def relative_error(got: Tensor, want: Tensor, rows: int = ROWS) -> float:
    """Relative RMS error of ``got`` against ``want``, both ``[batch, heads, tokens, ...]``.

    It is computed over all heads in each block of ``rows`` tokens, and the worst block counts, so that a wrong tile is
    not averaged away.
    """
    errors = []
    for a, b in zip(got.split(rows, dim=2), want.split(rows, dim=2), strict=True):
        b = b.float()
        errors.append((a.float() - b).norm() / b.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return float(torch.stack(errors).max())
