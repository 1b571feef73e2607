"""The public operation: checks its arguments and chooses the implementation."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend, triton_refusal
from sparsetrain_kernels.eager import apply
from sparsetrain_kernels.listed_keys import reference
from sparsetrain_kernels.listed_keys.inputs import ListedInputs, ListedOptions, check_listed_inputs
from sparsetrain_kernels.listed_keys.library import ListedAttention

MOST_HEADS = 128
"""Query heads that share a KV head, at most, for the kernels: their lines make up a tile."""


@overload
def listed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    counts: Tensor,
    cu_segments: Tensor,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    **options: Unpack[ListedOptions],
) -> Tensor: ...


@overload
def listed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    counts: Tensor,
    cu_segments: Tensor,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
    **options: Unpack[ListedOptions],
) -> tuple[Tensor, Tensor]: ...


def listed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    counts: Tensor,
    cu_segments: Tensor,
    *,
    skip: int | Tensor = 0,
    window: int = 0,
    sinks: int = 0,
    granule: int = 1,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of segments of rows over a list of keys each, and over themselves (2411.05787, section 6).

    Segment ``g`` is the rows ``cu_segments[g]`` to ``cu_segments[g + 1] - 1``. Its first ``skip[g]`` rows are not
    computed: they attend in another way, as those do whose scores chose the list. Let ``f`` be the row after them. Row
    ``i >= f`` of the segment sees

    - the keys of the segment's list for its KV head that lie before row ``f - window``,
    - the rows ``f - window`` to ``i`` of its document, and
    - the first ``sinks`` tokens of its document,

    each key once. What a list holds of the other two kinds, or of later rows, is left out; what it holds twice counts
    twice. The order of a list does not matter. The lists themselves are constants.

    Rows that are not computed have an output of 0, a log-sum-exp of -inf and no gradient. Logits, softmax and sums are
    fp32 (fp64 for fp64 inputs). Memory grows linearly with the length and with the lists; gradients are the same bit
    for bit on every run.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, N, D]``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        lists: int32 ``[B, Hkv, segments, capacity]``, positions of keys that count from the start of the segment's
            document. With ``granule`` above 1, entry ``e`` stands for the keys ``e * granule`` to ``(e + 1) * granule -
            1``. Of a segment's list the first ``counts`` places are read.
        counts: int32 ``[B, Hkv, segments]``, from 0 to ``capacity``.
        cu_segments: int32 ``[segments + 1]``, the bounds of the segments, the same for all sequences of the batch. Must
            rise from 0 to ``N``, and no segment may be in two documents; Triton does not read it on the host to check.
        skip: the rows at the start of each segment that are not computed; a number, or int32 ``[segments]``. A segment
            may skip all of its rows.
        window: tokens before a segment's first row that is computed, which all its rows see.
        sinks: the first tokens of a document, which all rows see.
        granule: neighbouring keys that an entry of a list stands for, a power of two up to 64.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, which do not see each other. Needs
            ``B == 1``.
        scale: factor on the logits; None means ``D ** -0.5``.
        return_lse: also return the log of the softmax denominator. Differentiable.
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256, groups of up to 128 heads), ``reference`` (plain
            PyTorch, which reads bounds on the host), or ``auto``: on CUDA the first of them that can run the call, else
            the last.

    Returns:
        ``[B, Hq, N, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, N]`` (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    inputs = check_listed_inputs(
        query,
        key,
        value,
        lists,
        counts,
        cu_segments,
        skip=skip,
        window=window,
        sinks=sinks,
        granule=granule,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
    refusals = {
        "triton": triton_refusal(inputs.query) or _too_many_heads(inputs),
        "gluon": "there is no Hopper version",
    }
    chosen = choose_backend(backend, inputs.query, refusals)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:3])
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    args = (*inputs, chosen)
    out, lse = apply(ListedAttention, *args) if needs_grad else ListedAttention.forward(*args)
    return (out, lse) if return_lse else out


def _too_many_heads(inputs: ListedInputs) -> str | None:
    """Why the kernels have no tile for a row of a group, or None."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    if group > MOST_HEADS:
        return f"its kernels take up to {MOST_HEADS} query heads a KV head, not {group}"
    return None


def listed_attention_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    counts: Tensor,
    cu_segments: Tensor,
    **options: Unpack[ListedOptions],
) -> tuple[Tensor, Tensor]:
    """The oracle of :func:`listed_attention` (2411.05787, section 6): builds the whole ``N x N`` mask.

    Plain autograd; matrix products run in the inputs' dtype. A list that holds a key twice is read as if it did once.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, N, D]``.
        lists: int32 ``[B, Hkv, segments, capacity]``.
        counts: int32 ``[B, Hkv, segments]``.
        cu_segments: int32 ``[segments + 1]``.
        options: ``skip``, ``window``, ``sinks``, ``granule``, ``cu_seqlens`` and ``scale`` of :func:`listed_attention`.

    Returns:
        ``out [B, Hq, N, D]`` in the query's dtype and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    return reference.dense_attention(check_listed_inputs(query, key, value, lists, counts, cu_segments, **options))
