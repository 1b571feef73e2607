"""The public operation: checks its arguments and chooses the implementation."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend, gluon_refusal, triton_refusal
from sparsetrain_kernels.dense import reference
from sparsetrain_kernels.dense.row_inputs import RowInputs, check_row_inputs
from sparsetrain_kernels.dense.row_library import CausalRows
from sparsetrain_kernels.dense.row_reference import dense_rows
from sparsetrain_kernels.documents import from_documents
from sparsetrain_kernels.eager import apply
from sparsetrain_kernels.inputs import AttentionInputs, AttentionOptions, Document, check_inputs


@overload
def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    query_positions: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    query_positions: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    q_start: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    query_positions: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over all earlier keys (1706.03762, equation 1), or over a sliding window of them.

    No ``N x M`` tensor is built.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, M, D]`` with ``M >= N``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        window: tokens a query sees, its own included; None means all earlier ones.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, which do not see each other. Needs
            ``B == 1`` and ``M == N``. Must rise from 0 to ``N``.
        q_start: position of the first query among the keys; None means ``M - N``.
        scale: factor on the logits; None means ``D ** -0.5``.
        softcap: ``softcap * tanh(logits / softcap)`` where given.
        sink_logits: ``[Hq]``, one more logit a row that takes part in the softmax denominator only. Differentiable.
        query_positions: int32 ``[N]``, for chosen rows of a sequence: the ascending places of the queries among the
            keys, each of which sees the keys of its document up to its own. With ``cu_seqlens``, which then counts
            keys, and without ``window``, ``q_start``, ``softcap`` and ``sink_logits``. Triton does not read them on the
            host to check.
        return_lse: also return the log of the softmax denominator (the sink included). Differentiable.
        backend: ``reference`` (plain PyTorch, torch's fused attention where it is the same) or ``auto``, which is the
            same: only chosen rows have kernels. These are ``triton`` (fp32, fp16 and bf16, head dim up to 256) and, for
            the gradients of keys and values, ``gluon`` (Hopper: fp16 and bf16, head dim 64 or 128); ``auto`` takes on
            CUDA what can run the call, ``gluon`` first.

    Returns:
        ``[B, Hq, N, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, N]`` (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    if query_positions is not None:
        others = {"window": window, "q_start": q_start, "softcap": softcap, "sink_logits": sink_logits}
        rows = check_row_inputs(query, key, value, query_positions, cu_seqlens=cu_seqlens, scale=scale, others=others)
        out, lse = _chosen_rows(rows, backend)
        return (out, lse) if return_lse else out
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
    _check_window(window)
    none = "dense attention has no kernels of its own"
    choose_backend(backend, inputs.query, {"gluon": none, "triton": none})
    documents = _documents(inputs)
    if not return_lse and reference.fused_applies(inputs, documents, window):
        return reference.fused_attention(inputs, documents, window)
    out, lse = reference.attention(inputs, window)
    return (out, lse) if return_lse else out


def _documents(inputs: AttentionInputs) -> tuple[Document, ...]:
    """The sequences in the tensors; of packed ones the device is asked once for all the layers of a pass."""
    if inputs.cu_seqlens is None:
        return inputs.documents()
    return from_documents(inputs.cu_seqlens, ("documents", inputs.query.shape[2]), inputs.documents)


def _chosen_rows(inputs: RowInputs, backend: str) -> tuple[Tensor, Tensor]:
    refusals = {"triton": triton_refusal(inputs.query), "gluon": gluon_refusal(inputs.query)}
    chosen = choose_backend(backend, inputs.query, refusals)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:3])
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    args = (*inputs, chosen)
    return apply(CausalRows, *args) if needs_grad else CausalRows.forward(*args)


def causal_attention_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    query_positions: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]:
    """The oracle of :func:`causal_attention` (1706.03762, equation 1): builds the whole ``N x M`` mask.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, M, D]`` with ``M >= N``.
        window: tokens a query sees, its own included; None means all earlier ones.
        query_positions: int32 ``[N]``, the places of chosen rows among the keys.
        options: ``cu_seqlens``, ``q_start``, ``scale``, ``softcap`` and ``sink_logits`` of :func:`causal_attention`.

    Returns:
        ``out [B, Hq, N, D]`` in the query's dtype and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    if query_positions is not None:
        cu_seqlens, scale = options.pop("cu_seqlens", None), options.pop("scale", None)
        others = {"window": window, **options}
        rows = check_row_inputs(query, key, value, query_positions, cu_seqlens=cu_seqlens, scale=scale, others=others)
        return dense_rows(rows)
    _check_window(window)
    return reference.dense_attention(check_inputs(query, key, value, **options), window)


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 token (the query's own), or None for no window")
