"""The arguments of attention over a SparseK selection, checked once."""

from __future__ import annotations

import difflib
from typing import NamedTuple, Required, TypedDict

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_tensors
from sparsetrain_kernels.inputs import AttentionInputs, Document, check_inputs, consecutive_rows, row_major

GATES = ("value", "log", "straight")


class SelectedOptions(TypedDict, total=False):
    """The arguments of every operation here besides the tensors; ``selected_attention`` describes them."""

    window: Required[int]
    topk: Required[int]
    sinks: int
    gate: str
    cu_seqlens: Tensor | None
    scale: float | None


class SelectedInputs(NamedTuple):
    """Checked arguments of one call. What the integers in ``exit`` and ``cu_seqlens`` are is not checked: they may lie
    on a device."""

    query: Tensor
    """``[B, Hq, N, D]``; the elements of a row follow one another, in key and value too."""
    key: Tensor
    """``[B, Hkv, N, D]``."""
    value: Tensor
    scores: Tensor
    """``[B, Hs, N]`` with ``Hs`` = ``Hkv`` or 1, fp32 (fp64 for fp64 queries), contiguous like the next two."""
    threshold: Tensor
    """``[B, Hs, N]`` a query row, in the dtype of ``scores``."""
    exit: Tensor
    """int32 ``[B, Hs, N]`` a key: it is selected in rows ``[j + window, exit_j)``."""
    cu_seqlens: Tensor | None
    """int32 ``[documents + 1]``, on the tensors' device."""
    scale: float
    topk: int
    window: int
    sinks: int
    gate: str

    def documents(self) -> tuple[Document, ...]:
        """The sequences in the tensors. Reads ``cu_seqlens`` on the host.

        Raises:
            ValueError: ``cu_seqlens`` does not rise from 0 to the number of tokens.
        """
        return AttentionInputs(*self[:3], self.cu_seqlens, 0, self.scale, None, None).documents()


def check_selected_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    threshold: Tensor,
    exit: Tensor,
    *,
    window: int,
    topk: int,
    sinks: int = 0,
    gate: str = "value",
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> SelectedInputs:
    """Check shapes, dtypes and ranges, fill in the defaults, and lay the tensors out as the operations want them.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    query, key, value, cu_seqlens, _, scale, *_ = check_inputs(query, key, value, cu_seqlens=cu_seqlens, scale=scale)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} rows, but key has {key.shape[2]}; expected as many, a query for each key"
        )
    check_tensors(scores=scores, threshold=threshold, exit=exit)
    dtype = torch.promote_types(query.dtype, torch.float32)
    for name, tensor, expected in (
        ("scores", scores, dtype),
        ("threshold", threshold, dtype),
        ("exit", exit, torch.int32),
    ):
        _check_per_token(name, tensor, expected, query, key)
        if tensor.shape != scores.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but scores has {tuple(scores.shape)}")
    check_count("window", window, 1, "the own token is always seen")
    check_count("topk", topk, 1, "for a window alone, use causal_attention(window=...)")
    check_count("sinks", sinks, 0, "0 keeps no first token")
    if gate not in GATES:
        nearest = difflib.get_close_matches(str(gate), GATES, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(GATES)}"
        raise ValueError(f"gate={gate!r} does not exist; {hint}")
    scores, threshold, exit = row_major(scores, threshold, exit)
    return SelectedInputs(
        consecutive_rows(query),
        consecutive_rows(key),
        consecutive_rows(value),
        scores,
        threshold,
        exit,
        None if cu_seqlens is None else cu_seqlens.to(query.device),
        scale,
        topk,
        window,
        sinks,
        gate,
    )


def _check_per_token(name: str, tensor: Tensor, dtype: torch.dtype, query: Tensor, key: Tensor) -> None:
    """``exit``, ``scores`` and ``threshold``: one number a token, for each KV head or for all of them."""
    if tensor.dtype != dtype:
        why = f" for a query of {query.dtype}" if dtype.is_floating_point else ""
        if tensor.dtype.itemsize < dtype.itemsize and why:
            why += ": fewer bits reorder the scores"
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}{why}")
    if tensor.device != query.device:
        raise TypeError(f"{name} is on {tensor.device}, but query is on {query.device}")
    batch, heads, tokens = key.shape[:3]
    if tensor.dim() != 3 or tensor.shape[1] not in (heads, 1) or tensor.shape != (batch, tensor.shape[1], tokens):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected ({batch}, {heads}, {tokens}): one number a token for "
            f"each KV head, or ({batch}, 1, {tokens}) for all of them"
        )
