"""Whether the implementations compute the same: outputs and gradients, before any of them is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sparsetrain_kernels import block_pattern_attention_dense, causal_attention_dense
from torch import Tensor

from sparsetrain.bench.attention_opponents import Prepared
from sparsetrain.bench.problem import Problem, Tensors

ROWS = 128
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error that is still rounding; TF32 in fp32. One missing tile of 128 x 128 makes far more."""


class Answer(NamedTuple):
    """An output and its gradients, each ``[batch, heads, tokens, head_dim]``."""

    out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Check:
    """One implementation compared at one length."""

    name: str
    length: int
    against: str
    tolerance: float
    errors: tuple[float, ...] = ()
    """Relative RMS errors of the output and of the gradients of query, key and value, each in its worst 128 rows."""
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
    out, query, key, value = (prepared.layout.restore(tensor) for tensor in (out.detach(), *gradients))
    if prepared.repeat > 1:
        key, value = (tensor.unflatten(1, (-1, prepared.repeat)).sum(2) for tensor in (key, value))
    return Answer(out, query, key, value)


def oracle(problem: Problem, tensors: Tensors, sparse: bool) -> Answer:
    """The definition in fp32, under the whole mask: for short lengths only."""
    query, key, value = (tensor.detach().float().requires_grad_() for tensor in tensors[:3])
    if sparse:
        out, _ = block_pattern_attention_dense(query, key, value, problem.pattern, cu_seqlens=problem.cu_seqlens())
    else:
        out, _ = causal_attention_dense(query, key, value, cu_seqlens=problem.cu_seqlens())
    return Answer(out.detach(), *torch.autograd.grad(out, (query, key, value), tensors.upstream.float()))


def relative_errors(got: Answer, want: Answer) -> tuple[float, ...]:
    """The relative error of each tensor."""
    return tuple(relative_error(*pair) for pair in zip(got, want, strict=True))


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS error over RMS of ``want``, all heads together, in the worst 128 rows: no wrong tile is averaged away."""
    errors = []
    for a, b in zip(got.split(ROWS, dim=2), want.split(ROWS, dim=2), strict=True):
        b = b.float()
        errors.append((a.float() - b).norm() / b.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return float(torch.stack(errors).max())
