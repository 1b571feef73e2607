"""The public operation: checks its arguments and chooses the implementation."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count
from sparsetrain_kernels.backend import choose_backend, gluon_refusal, triton_refusal
from sparsetrain_kernels.block_pattern import reference
from sparsetrain_kernels.block_pattern.library import BlockPatternAttention, block_pattern_forward
from sparsetrain_kernels.block_pattern.pattern import BlockLists, BlockPattern, block_lists
from sparsetrain_kernels.eager import apply
from sparsetrain_kernels.inputs import AttentionInputs, AttentionOptions, check_inputs, consecutive_rows

GLUON_TILE = 128
WORKSPACE = 2**31
"""Bytes, where the caller does not say."""


@overload
def block_pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    workspace: int = WORKSPACE,
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
    workspace: int = WORKSPACE,
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
    workspace: int = WORKSPACE,
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
            positions count from each document's start. Needs ``B == 1`` and ``M == N``. Must rise from 0 to ``N``;
            Triton does not read it on the host to check.
        q_start: position of the first query among the keys; None means ``M - N``. Keys after the last query are never
            read.
        scale: factor on the logits; None means ``D ** -0.5``.
        softcap: ``softcap * tanh(logits / softcap)`` where given.
        sink_logits: ``[Hq]``, one more logit a row that takes part in the softmax denominator only. Differentiable.
        return_lse: also return the log of the softmax denominator (the sink included). Differentiable.
        backend: ``gluon`` (Hopper: fp16 and bf16, head dim 64 or 128, blocks of a multiple of 128, no extras),
            ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch), or ``auto``: on CUDA
            the first of them that can run the call, else the last.
        workspace: bytes that the backward pass of ``gluon`` may take for its sums, by default 2 GiB. For heads of 128
            it adds up the gradient of queries in int32, ``4 * B * Hq * N * D`` bytes, and works on as many KV heads at
            a time as fit. Where not one does, it computes the scores twice instead, which takes longer.

    Returns:
        ``[B, Hq, N, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, N]`` (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    check_count("workspace", workspace, 0, unit="bytes")
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
    lists = block_lists(pattern, -(-key.shape[2] // pattern.block), key.shape[1])
    refusals = {"triton": triton_refusal(inputs.query), "gluon": _gluon_refusal(inputs, lists)}
    chosen = choose_backend(backend, inputs.query, refusals)
    if chosen != "reference" and inputs.cu_seqlens is not None:
        inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.to(query.device))
    query, key, value = (consecutive_rows(tensor) for tensor in inputs[:3])
    trained = (query, key, value) if sink_logits is None else (query, key, value, sink_logits)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    args = (query, key, value, *inputs[3:], *lists, chosen, workspace)
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    out, lse = apply(BlockPatternAttention, *args) if needs_grad else block_pattern_forward(*args)
    return (out, lse) if return_lse else out


def _gluon_refusal(inputs: AttentionInputs, lists: BlockLists) -> str | None:
    """Why the Hopper kernels cannot run this, if so."""
    if (refusal := gluon_refusal(inputs.query)) is not None:
        return refusal
    if lists.block % GLUON_TILE != 0:
        return f"its tiles of {GLUON_TILE} tokens do not divide the pattern's block of {lists.block}"
    if inputs.softcap is not None or inputs.sink_logits is not None:
        return "its kernels know no softcap and no sink_logits"
    rows, keys = inputs.query.shape[2], inputs.key.shape[2]
    if rows != keys:
        return f"its kernels take as many keys as query rows, not {rows} rows and {keys} keys"
    return None


def block_pattern_attention_dense(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor]:
    """The oracle of :func:`block_pattern_attention`: builds the whole ``N x M`` mask, in plain autograd.

    Takes the same tensors, pattern and options; matrix products run in the inputs' dtype.

    Returns:
        ``out [B, Hq, N, D]`` and ``lse [B, Hq, N]``.
    """
    return reference.dense_attention(check_inputs(query, key, value, **options), pattern)
