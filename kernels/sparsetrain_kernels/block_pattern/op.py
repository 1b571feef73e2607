"""The public operation: checks its arguments and chooses the implementation."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from sparsetrain_kernels.backend import choose_backend
from sparsetrain_kernels.block_pattern import reference
from sparsetrain_kernels.block_pattern.pattern import BlockPattern
from sparsetrain_kernels.inputs import AttentionOptions, check_inputs


@overload
def block_pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def block_pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


def block_pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    cu_seqlens: Tensor | None = None,
    q_start: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which each block of queries reads the blocks of keys that ``pattern`` lists for it.

    Block ``t`` holds positions ``t * block`` to ``(t + 1) * block - 1`` of its document, for queries and keys alike, so
    the rows of one call may start or end anywhere in a block. Logits, softmax and accumulation are fp32 (fp64 for fp64
    inputs). Memory and time grow with the listed blocks; gradients are the same bit for bit on every run.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, M, D]`` with ``M >= N``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        pattern: the lists; hashable. With ``pattern.per_head`` each KV head has its own.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, which do not see each other; block
            positions count from each document's start. Needs ``B == 1`` and ``M == N``.
        q_start: position of the first query among the keys; None means ``M - N``. Keys after the last query are never
            read.
        scale: factor on the logits; None means ``D ** -0.5``.
        softcap: ``softcap * tanh(logits / softcap)`` where given.
        sink_logits: ``[Hq]``, one more logit a row that takes part in the softmax denominator only. Differentiable.
        return_lse: also return the log of the softmax denominator (the sink included). Differentiable.
        backend: ``auto`` or ``reference``.

    Returns:
        ``[B, Hq, N, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, N]`` (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    inputs = check_inputs(
        query,
        key,
        value,
        cu_seqlens=cu_seqlens,
        q_start=q_start,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    choose_backend(backend, query)
    out, lse = reference.attention(inputs, pattern)
    return (out, lse) if return_lse else out


def block_pattern_attention_dense(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor]:
    """The oracle of :func:`block_pattern_attention`: builds the whole ``N x M`` mask, in plain autograd.

    Takes the same tensors, pattern and options; matrix products run in the inputs' dtype.

    Returns:
        ``out [B, Hq, N, D]`` and ``lse [B, Hq, N]``.
    """
    return reference.dense_attention(check_inputs(query, key, value, **options), pattern)
