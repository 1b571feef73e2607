"""The public operation: checks its arguments and chooses the implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count
from sparsetrain_kernels.backend import choose_backend, gluon_refusal, triton_refusal
from sparsetrain_kernels.block_pattern import reference
from sparsetrain_kernels.block_pattern.library import BlockPatternAttention, block_pattern_forward
from sparsetrain_kernels.block_pattern.pattern import BlockLists, BlockPattern, block_lists
from sparsetrain_kernels.eager import apply, called_plainly
from sparsetrain_kernels.inputs import AttentionInputs, AttentionOptions, check_inputs, consecutive_rows

GLUON_TILE = 128
WORKSPACE = 2**31
"""Bytes, where the caller does not say."""
MOST_KNOWN = 4096
_KNOWN: dict[tuple[Any, ...], tuple[tuple[Any, ...], BlockLists, Mapping[str, str | None]]] = {}
"""What follows from arguments that are alike: the numbers among the inputs, lists, refusals."""


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
    inputs, lists, refusals = _check(
        (query, key, value), cu_seqlens, pattern, workspace, scale, q_start, softcap, sink_logits
    )
    chosen = choose_backend(backend, inputs.query, refusals)
    if chosen != "reference" and inputs.cu_seqlens is not None:
        inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.to(query.device))
    args = (*inputs, *lists, chosen, workspace)
    query, key, value, sinks = *inputs[:3], inputs.sink_logits
    trained = query.requires_grad or key.requires_grad or value.requires_grad
    trained = trained or (sinks is not None and sinks.requires_grad)
    needs_grad = trained and torch.is_grad_enabled()
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    out, lse = apply(BlockPatternAttention, *args) if needs_grad else block_pattern_forward(*args)
    return (out, lse) if return_lse else out


def _check(
    tensors: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor | None,
    pattern: BlockPattern,
    workspace: int,
    scale: float | None,
    *rare: Any,
) -> tuple[AttentionInputs, BlockLists, Mapping[str, str | None]]:
    """The inputs as kernels take them, the pattern's lists, and what speaks against the backends. ``rare`` are
    ``q_start``, ``softcap`` and ``sink_logits``.

    The layers of a model and the steps of a run give tensors that are laid out alike. Without rare arguments, and where
    nothing but the data can be another, nothing is looked at twice.
    """
    q_start, softcap, sink_logits = rare
    given = tensors if cu_seqlens is None else (*tensors, cu_seqlens)
    # True, which is refused, equals 1.
    plain = q_start is softcap is sink_logits is None and type(workspace) is int and type(scale) in (float, type(None))
    alike = None
    if plain and called_plainly(*given) and not torch.is_autocast_enabled(given[0].device.type):
        layouts = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in given]
        alike = (pattern, scale, workspace, *layouts)
        if (known := _KNOWN.get(alike)) is not None:
            numbers, lists, refusals = known
            return AttentionInputs(*tensors, cu_seqlens, *numbers), lists, refusals
    check_count("workspace", workspace, 0, unit="bytes")
    inputs = check_inputs(
        *tensors, cu_seqlens=cu_seqlens, q_start=q_start, scale=scale, softcap=softcap, sink_logits=sink_logits
    )
    query, key, value = (consecutive_rows(tensor) for tensor in inputs[:3])
    inputs = AttentionInputs(query, key, value, *inputs[3:])
    lists = block_lists(pattern, -(-key.shape[2] // pattern.block), key.shape[1])
    refusals = {"triton": triton_refusal(query), "gluon": _gluon_refusal(inputs, lists)}
    if alike is not None and all(a is b for a, b in zip(inputs[:4], (*tensors, cu_seqlens), strict=True)):
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[alike] = inputs[4:], lists, refusals
    return inputs, lists, refusals


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
