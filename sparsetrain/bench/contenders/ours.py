"""sparsetrain's own operations."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from sparsetrain_kernels import (
    block_pattern_attention,
    block_pattern_decode,
    causal_sparsek,
    sparsek_attention,
)
from torch import Tensor

from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.problem import PatternProblem, SparseKProblem, Tensors
from sparsetrain.methods.sparsek.state import Sequence

if TYPE_CHECKING:
    from sparsetrain.bench.decoding import DecodeProblem, Layer

BOTH = ("cuda", "cpu")


def _block_pattern(problem: PatternProblem, tensors: Tensors, backend: str = "auto") -> Prepared:
    cu_seqlens, pattern = problem.cu_seqlens(), problem.pattern

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_pattern_attention(query, key, value, pattern, cu_seqlens=cu_seqlens, backend=backend)

    return Prepared(attend)


def _sparsek(problem: SparseKProblem, tensors: Tensors) -> Prepared:
    """All that a layer does in training once it has scores: the selection, and attention over it."""
    topk, window, sinks = problem.topk, problem.window, problem.sinks

    def attend(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return sparsek_attention(query, key, value, scores, topk, window, sinks, gate=problem.gate)

    return Prepared(attend, select=lambda scores: causal_sparsek(scores, topk, window, sinks=sinks).threshold)


def _block_pattern_step(problem: DecodeProblem, layer: Layer) -> Prepared:
    lengths, pattern = problem.cache_lengths(), problem.pattern
    return Prepared(lambda query, key, value: block_pattern_decode(query, key, value, pattern, lengths=lengths))


def _sparsek_step(problem: DecodeProblem, layer: Layer) -> Prepared:
    """A layer's state in generation, which has read all tokens but the last: it takes that in, and attends."""
    scores, last = problem.scores(), problem.length - 1
    state = problem.sparsek.build(problem.kv_heads).memory().state
    positions = torch.arange(last, device=problem.device).expand_as(scores[:, :, :last])
    past = Sequence(layer.key[:, :, :last], layer.value[:, :, :last], scores[:, :, :last], positions)
    state.start(layer.key)
    state.fill(slice(None), past, last, None)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        state.step(key[:, :, last:], value[:, :, last:], scores[:, :, last:], None)
        return state.attend(query, gate=problem.sparsek.gate, scale=None)

    return Prepared(attend)


PATTERN = (
    Contender("ours", "sparsetrain", "blocks", _block_pattern, BOTH),
    Contender("ours-triton", "sparsetrain, plain Triton", "blocks", partial(_block_pattern, backend="triton")),
)
SPARSEK = Contender("ours", "sparsetrain", "selected", _sparsek, BOTH)
STEPS = (
    Contender("ours", "sparsetrain, PowerAttention", "blocks", _block_pattern_step, BOTH),
    Contender("sparsek", "sparsetrain, SparseK", "selected", _sparsek_step, BOTH),
)
