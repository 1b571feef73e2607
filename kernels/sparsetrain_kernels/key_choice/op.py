"""The public operations: they check their arguments and choose the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_number
from sparsetrain_kernels.backend import choose_backend, triton_refusal
from sparsetrain_kernels.key_choice import library  # noqa: F401  (defines the operation)
from sparsetrain_kernels.key_choice.inputs import ChoiceInputs, check_choice
from sparsetrain_kernels.top_p_selection.selection import GROUPS, PositionLists, check_width


def top_k_keys(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    k: int,
    *,
    query_positions: Tensor,
    width: int = 7,
    sinks: int = 0,
    window: int = 0,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> PositionLists:
    """Of each chosen row, the ``k`` keys of the highest weight (Recycled Attention: 2411.05787, section 3).

    A key's weight is the largest of the attention weights over the heads of its group, and then over the ``width``
    positions around its own. Logarithms of weights are compared in fp16. Pooling makes many of them equal: of equal
    keys the newest are taken. The row itself competes too. The first ``sinks`` tokens of a document and the last
    ``window`` ones up to the row, itself included, are attended in any case and not listed.

    The lists are what :func:`listed_attention` takes, one a segment, where each row of ``query`` stands before its
    segment's computed rows. They are constants, without a gradient. Rows are taken some at a time: no ``P x M`` tensor
    is built.

    Args:
        query: ``[B, Hq, P, D]``, the chosen rows, as :func:`causal_attention` takes them.
        key: ``[B, Hkv, M, D]``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        lse: fp32 ``[B, Hq, P]``, the log-sum-exp of the rows, as :func:`causal_attention` returns it.
        k: keys of a list; of fewer all are listed.
        query_positions: int32 ``[P]``, the ascending places of the rows among the keys.
        width: positions over which the largest weight is taken, an odd number; 1 for no pooling.
        sinks: the first tokens of a document, which are not listed.
        window: the last tokens, which are not listed.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, counted in keys. Needs ``B == 1``.
        scale: factor on the logits; None means ``D ** -0.5``.
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch, which reads
            positions on the host), or ``auto``: on CUDA the first of them that can run the call, else the last.

    Returns:
        :class:`PositionLists`: ``lists [B, Hkv, P, k]``, positions within the document, ascending; ``counts [B, Hkv,
        P]`` and ``dropped [B, Hkv, P]``, the keys that are equal to the last one listed and older; int32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    check_count("k", k, 1, unit="keys")
    check_width(width)
    inputs = check_choice(
        query,
        key,
        lse,
        query_positions,
        capacity=k,
        p=0.0,
        group="max",
        width=width,
        sinks=sinks,
        window=window,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
    return _run(inputs, backend)


def top_p_keys(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    p: float,
    *,
    query_positions: Tensor,
    capacity: int,
    group: str = "union",
    sinks: int = 0,
    window: int = 0,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> PositionLists:
    """Of each chosen row, the fewest keys that hold a share ``p`` of the weight (Twilight: 2502.02770, Algorithm 1).

    As :func:`top_p_lists` finds them, from logarithms of the weights in fp16: shares are counted to about one part in a
    thousand. Of equal keys that do not all fit ``capacity`` there is none. All else is as in :func:`top_k_keys`,
    without pooling over positions.

    Args:
        query: ``[B, Hq, P, D]``.
        key: ``[B, Hkv, M, D]``.
        lse: fp32 ``[B, Hq, P]``.
        p: share of the weight, above 0 and up to 1, which keeps every key.
        query_positions: int32 ``[P]``.
        capacity: places of a list; of more keys those of the highest weight are listed.
        group: how the query heads of a KV head share a list: the ``union`` of their sets, or the set of the ``max`` or
            the ``mean`` of their weights.
        sinks: the first tokens of a document, which count as kept and are not listed.
        window: the last tokens, likewise.
        cu_seqlens: int32 ``[documents + 1]``.
        scale: factor on the logits; None means ``D ** -0.5``.
        backend: ``triton``, ``reference`` or ``auto``.

    Returns:
        :class:`PositionLists`: ``lists [B, Hkv, P, capacity]``, ``counts [B, Hkv, P]`` and ``dropped [B, Hkv, P]``, the
        keys for which there was no room; int32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    check_number("p", p)
    if not 0 < p <= 1:
        raise ValueError(f"p={p} is no share of the weight, above 0 and up to 1")
    check_count("capacity", capacity, 1, unit="keys")
    if group not in GROUPS:
        raise ValueError(f"group={group!r} does not exist; choose one of {', '.join(GROUPS)}")
    inputs = check_choice(
        query,
        key,
        lse,
        query_positions,
        capacity=capacity,
        p=float(p),
        group=group,
        width=1,
        sinks=sinks,
        window=window,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
    return _run(inputs, backend)


def _run(inputs: ChoiceInputs, backend: str) -> PositionLists:
    refusals = {"triton": triton_refusal(inputs.query), "gluon": "there is no Hopper version"}
    chosen = choose_backend(backend, inputs.query, refusals)
    return PositionLists(*torch.ops.sparsetrain.key_choice(*inputs, chosen))
