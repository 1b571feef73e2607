"""The public operations: they check their arguments and choose the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_tensors
from sparsetrain_kernels.backend import choose_backend
from sparsetrain_kernels.top_p_selection import library  # noqa: F401  (defines the operation)
from sparsetrain_kernels.top_p_selection.selection import (
    PositionLists,
    SelectionInputs,
    check_into,
    check_selection,
    check_width,
)

_REFUSALS = {"triton": None, "gluon": "selection has plain Triton kernels only"}


def top_p_lists(
    scores: Tensor,
    lse: Tensor,
    p: float | Tensor,
    *,
    lengths: Tensor,
    num_kv_heads: int,
    capacity: int,
    group: str = "union",
    min_keys: int = 1,
    sinks: int = 0,
    recent: int | Tensor = 0,
    page_lists: Tensor | None = None,
    page_counts: Tensor | None = None,
    due: Tensor | None = None,
    into: PositionLists | None = None,
    backend: str = "auto",
) -> PositionLists:
    """Per head, the fewest keys that hold a share ``p`` of the softmax weight: Twilight's top-p.

    The weight ``exp(score - lse)`` of a key is counted in integers of ``2^-40``, of which a row has ``2^40`` by the
    meaning of its log-sum-exp. A row's threshold is one of the 65,536 numbers that fp16 has: the largest from which on
    keys weigh at least ``p``. So the set is the smallest that holds ``p``, with all keys equal to its least one. It is
    found without a sort, a tolerance or a sum that depends on its order (2502.02770, Algorithm 1, whose bisection stops
    at a tolerance). It is as exact as ``lse``: to about one part in a million of the weight in fp32.

    The first ``sinks`` tokens and the last ``recent`` ones are attended in any case: they count as kept and are not
    listed. Where a group's keys are more than ``capacity``, its list has those of the highest weight, where weights of
    ``exp(score - lse)`` are compared in fp16 and the highest of the heads that chose a key counts; of equal ones that
    do not all fit there is none. ``dropped`` counts what is left out.

    With the Triton kernels nothing is read on the host, and no shape depends on a value, so that a call can be captured
    in a CUDA graph (after one call outside of it). They use another exponential function than plain PyTorch, whose
    last bit may decide where two sets differ by one part in a million of the weight.

    Args:
        scores: fp16 ``[B, Hq, M]``, the logits of one token's query; -inf where there is no key. Column ``c`` is
            position ``c``, or token ``c % 16`` of candidate page ``c // 16``.
        lse: fp32 ``[B, Hq]``, the log-sum-exp of each row of scores, as :func:`estimate_scores` returns it.
        p: share of the weight, above 0 and up to 1, which keeps every key; or fp32 ``[Hq]`` or ``[1]``.
        lengths: int32 ``[B]``, the tokens of each sequence; scores behind them are not looked at.
        num_kv_heads: ``Hkv``, which divides ``Hq``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        capacity: places of a list.
        group: how the query heads of a KV head share a list: the ``union`` of their sets, or the set of the ``max`` or
            the ``mean`` of their weights, with the largest of their ``p``.
        min_keys: keys that a set has at least, beside those attended in any case, where there are so many.
        sinks: the first tokens, which are attended in any case.
        recent: the last tokens, the new one among them, which are; a number, or int32 ``[B]``.
        page_lists: int32 ``[B, Hkv, ceil(M / 16)]``, the candidates of each KV head, ascending pages of 16 tokens;
            None means all keys.
        page_counts: int32 ``[B, Hkv]``, the candidates that there are.
        due: bool ``[B]``, the sequences that are asked for; None means all. Of others nothing is read, and what is
            returned of them is undefined.
        into: tensors that are written and returned, of the sequences that are due; of others they stay as they are.
        backend: ``triton``, ``reference`` (plain PyTorch), or ``auto``.

    Returns:
        :class:`PositionLists`: ``lists [B, Hkv, capacity]``, ``counts [B, Hkv]`` and ``dropped [B, Hkv]``, int32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    check_tensors(lse=lse)
    inputs = check_selection(
        scores,
        lse,
        p,
        lengths=lengths,
        num_kv_heads=num_kv_heads,
        group=group,
        width=1,
        min_keys=min_keys,
        capacity=capacity,
        newest=False,
        sinks=sinks,
        recent=recent,
        page_lists=page_lists,
        page_counts=page_counts,
        due=due,
    )
    if not inputs.p > 0:
        raise ValueError(f"p={p} must be above 0, or no key would be kept")
    return _run(inputs, into, backend)


def top_k_lists(
    scores: Tensor,
    lse: Tensor | None,
    k: int,
    *,
    lengths: Tensor,
    num_kv_heads: int,
    width: int = 7,
    sinks: int = 0,
    recent: int | Tensor = 0,
    page_lists: Tensor | None = None,
    page_counts: Tensor | None = None,
    due: Tensor | None = None,
    into: PositionLists | None = None,
    backend: str = "auto",
) -> PositionLists:
    """The ``k`` keys of the highest weight, as RefreshKV chooses them (2411.05787, section 3).

    A key's weight is the largest of ``exp(score - lse)`` over the heads of its group, and then over the ``width``
    positions around its own. Logarithms of weights are compared in fp16. Pooling makes many of them equal: of equal
    keys the newest are taken. All else is as in :func:`top_p_lists`.

    Args:
        scores: fp16 ``[B, Hq, M]``.
        lse: fp32 ``[B, Hq]``; None compares the scores of all heads as they are.
        k: keys of a list; of fewer all are listed.
        lengths: int32 ``[B]``.
        num_kv_heads: ``Hkv``.
        width: positions over which the largest weight is taken, an odd number; those of the tokens that are attended
            in any case are among them, those of pages that are no candidates are not.
        sinks: the first tokens, which are attended in any case and not listed.
        recent: the last tokens, which are neither; a number, or int32 ``[B]``.
        page_lists: int32 ``[B, Hkv, ceil(M / 16)]``.
        page_counts: int32 ``[B, Hkv]``.
        due: bool ``[B]``.
        into: what is written and returned.
        backend: ``triton``, ``reference`` or ``auto``.

    Returns:
        :class:`PositionLists`: ``lists [B, Hkv, k]``, ``counts [B, Hkv]`` and ``dropped [B, Hkv]``, which counts the
        keys that are equal to the last one listed and older.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    check_count("k", k, 1, unit="keys")
    check_width(width)
    inputs = check_selection(
        scores,
        lse,
        0.0,
        lengths=lengths,
        num_kv_heads=num_kv_heads,
        group="max",
        width=width,
        min_keys=k,
        capacity=k,
        newest=True,
        sinks=sinks,
        recent=recent,
        page_lists=page_lists,
        page_counts=page_counts,
        due=due,
    )
    return _run(inputs, into, backend)


def _run(inputs: SelectionInputs, into: PositionLists | None, backend: str) -> PositionLists:
    chosen = choose_backend(backend, inputs.scores, _REFUSALS)
    if into is None:
        return PositionLists(*torch.ops.sparsetrain.position_lists(*inputs, chosen))
    check_into(into, inputs)
    torch.ops.sparsetrain.position_lists_into(*inputs, chosen, *into)
    return into
