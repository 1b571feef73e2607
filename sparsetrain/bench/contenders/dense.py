"""Dense causal attention: cuDNN and FlashAttention 2 from torch, and FlashAttention 2 and 4 of their own packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sparsetrain_kernels import causal_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetrain.bench.contenders import fa4
from sparsetrain.bench.contenders.base import PACKED, PACKED_STEP, TOKENS_FIRST, Attention, Contender, Prepared
from sparsetrain.bench.measure import Unavailable


def _sdpa(backend: SDPBackend, **options: Any) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)

    return attend


def _cudnn(problem: Any, tensors: Any) -> Prepared:
    attend = _sdpa(SDPBackend.CUDNN_ATTENTION, is_causal=True)
    try:
        attend(*tensors[:3])
    except RuntimeError as error:
        if "kernel" not in str(error) or problem.heads == problem.kv_heads:
            raise
        note = "KV heads repeated before the measurement: this cuDNN does not share them"
        return Prepared(attend, repeat=problem.heads // problem.kv_heads, note=note)
    return Prepared(attend)


def _fa2(problem: Any, tensors: Any) -> Prepared:
    return Prepared(_sdpa(SDPBackend.FLASH_ATTENTION, is_causal=True))


def _chosen_by_torch(problem: Any, tensors: Any) -> Prepared:
    """One call a packed document."""
    cu_seqlens = problem.cu_seqlens()
    return Prepared(lambda query, key, value: causal_attention(query, key, value, cu_seqlens=cu_seqlens))


def _varlen(problem: Any, tensors: Any) -> Prepared:
    attend, takes = _varlen_attn()
    bounds, longest = problem.cu_seqlens(), max(problem.documents)
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    return Prepared(lambda *inputs: attend(*inputs, bounds, bounds, longest, longest, **options), PACKED)


def _varlen_step(problem: Any, layer: Any) -> Prepared:
    attend, _ = _varlen_attn()
    queries = torch.arange(problem.batch + 1, device=problem.device, dtype=torch.int32)
    keys = queries * problem.length
    return Prepared(lambda *inputs: attend(*inputs, queries, keys, 1, problem.length), PACKED_STEP)


def _varlen_attn() -> tuple[Attention, set[str]]:
    """torch's function and what it takes: its signature has grown from version to version."""
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn; it came in 2.10") from error
    varlen_attn: Any = varlen.varlen_attn
    takes = set(inspect.signature(varlen_attn).parameters)
    shared: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in takes else {}
    return lambda *inputs, **options: varlen_attn(*inputs, **shared, **options), takes


def _step(backend: SDPBackend) -> Callable[[Any, Any], Prepared]:
    """The only row sees every key: no mask. Some backends do not share KV heads."""
    shared = _sdpa(backend)

    def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
            return F.scaled_dot_product_attention(rows, key, value).view(query.shape)

    def prepare(problem: Any, layer: Any) -> Prepared:
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


def _fa2_step(problem: Any, layer: Any) -> Prepared:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise Unavailable(
            "flash_attn is not installed: pip install flash-attn; the row flash is FlashAttention 2 as torch has it"
        ) from error
    lengths = problem.cache_lengths()
    return Prepared(lambda *inputs: flash_attn_with_kvcache(*inputs, cache_seqlens=lengths, causal=True), TOKENS_FIRST)


def _step_chosen_by_torch(problem: Any, layer: Any) -> Prepared:
    return Prepared(lambda query, key, value: F.scaled_dot_product_attention(query, key, value, enable_gqa=True))


CAUSAL = (
    Contender("cudnn", "cuDNN, dense", "all", _cudnn, packed=(False,)),
    Contender("fa2", "FA2 of torch, dense", "all", _fa2, packed=(False,)),
    fa4.DENSE,
    Contender("varlen", "FA2 varlen, dense", "all", _varlen, packed=(True,)),
    Contender("sdpa", "SDPA of torch, dense", "all", _chosen_by_torch, ("cpu",)),
)
STEPS = (
    Contender("fa2", "FA2, full cache", "all", _fa2_step),
    Contender("flash", "FA2 of torch, full cache", "all", _step(SDPBackend.FLASH_ATTENTION)),
    Contender("cudnn", "SDPA cuDNN, full cache", "all", _step(SDPBackend.CUDNN_ATTENTION)),
    Contender("efficient", "SDPA efficient, full cache", "all", _step(SDPBackend.EFFICIENT_ATTENTION)),
    Contender("math", "SDPA math, full cache", "all", _step(SDPBackend.MATH)),
    Contender("varlen", "FA2 varlen, full cache", "all", _varlen_step),
    Contender("sdpa", "SDPA of torch, full cache", "all", _step_chosen_by_torch, ("cpu",)),
)
