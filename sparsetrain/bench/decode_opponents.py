"""The implementations of a decoding step that are measured: ours, and those that read the whole cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sparsetrain_kernels.block_pattern_decode import block_pattern_decode
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetrain.bench.attention_opponents import Layout, Prepared
from sparsetrain.bench.timing import Unavailable
from sparsetrain.methods.sparsek_state import Sequence

if TYPE_CHECKING:
    from sparsetrain.bench.decode import DecodeProblem, Layer

PACKED = Layout(
    lambda tensor: tensor.transpose(1, 2).flatten(0, 1).contiguous(),
    lambda tensor: tensor[:, :, None],
)
"""Sequences after one another, ``[batch * tokens, heads, head_dim]``."""


@dataclass(frozen=True)
class DecodeOpponent:
    """One implementation, ours among them."""

    name: str
    title: str
    reads: str
    """``all`` of the cache, the ``blocks`` that the pattern lists, or the keys that SparseK has ``selected``."""
    prepare: Callable[[DecodeProblem, Layer], Prepared]
    """Raises whatever goes wrong; :class:`Unavailable` with the reason where the machine lacks something."""
    devices: tuple[str, ...] = ("cuda",)

    @property
    def sparse(self) -> bool:
        """Whether it leaves keys out."""
        return self.reads != "all"


def _ours(problem: DecodeProblem, layer: Layer) -> Prepared:
    lengths, pattern = problem.lengths(), problem.pattern

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_pattern_decode(query, key, value, pattern, lengths=lengths)

    return Prepared(attend)


def _sparsek(problem: DecodeProblem, layer: Layer) -> Prepared:
    """A layer's state in generation, which has read all tokens but the last: it takes that in, and attends."""
    scores, last = problem.scores(), problem.length - 1
    state = problem.sparsek.build(problem.kv_heads).new_state()
    positions = torch.arange(last, device=problem.device).expand_as(scores[:, :, :last])
    past = Sequence(layer.key[:, :, :last], layer.value[:, :, :last], scores[:, :, :last], positions)
    state.start(layer.key)
    state.fill(slice(None), past, last, None)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        state.step(key[:, :, last:], value[:, :, last:], scores[:, :, last:], None)
        return state.attend(query, gate=problem.sparsek.gate, scale=None)

    return Prepared(attend)


def _sdpa(backend: SDPBackend) -> Callable[[DecodeProblem, Layer], Prepared]:
    """The only row sees every key: no mask. Some backends do not share KV heads."""

    def shared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
            return F.scaled_dot_product_attention(rows, key, value).view(query.shape)

    def prepare(problem: DecodeProblem, layer: Layer) -> Prepared:
        if problem.heads == problem.kv_heads:
            return Prepared(grouped)
        try:
            shared(*layer)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return Prepared(grouped, note="the heads of a group as query rows: it does not share KV heads itself")
        return Prepared(shared)

    return prepare


def _sdpa_chosen(problem: DecodeProblem, layer: Layer) -> Prepared:
    """Whatever torch's attention does here."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return Prepared(attend)


def _varlen(problem: DecodeProblem, layer: Layer) -> Prepared:
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn; it came in 2.10") from error
    queries = torch.arange(problem.batch + 1, device=problem.device, dtype=torch.int32)
    keys = queries * problem.length
    # Its signature has grown from version to version.
    varlen_attn: Callable[..., Tensor] = varlen.varlen_attn  # type: ignore[assignment]
    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in takes else {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attn(query, key, value, queries, keys, 1, problem.length, **options)

    return Prepared(attend, PACKED)


OPPONENTS = (
    DecodeOpponent("ours", "sparsetrain", "blocks", _ours, devices=("cuda", "cpu")),
    DecodeOpponent("sparsek", "sparsetrain, SparseK", "selected", _sparsek, devices=("cuda", "cpu")),
    DecodeOpponent("flash", "SDPA flash, full cache", "all", _sdpa(SDPBackend.FLASH_ATTENTION)),
    DecodeOpponent("cudnn", "SDPA cuDNN, full cache", "all", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    DecodeOpponent("efficient", "SDPA efficient, full cache", "all", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    DecodeOpponent("math", "SDPA math, full cache", "all", _sdpa(SDPBackend.MATH)),
    DecodeOpponent("varlen", "FA2 varlen, full cache", "all", _varlen),
    DecodeOpponent("sdpa", "SDPA of torch, full cache", "all", _sdpa_chosen, devices=("cpu",)),
)
