"""The public operation: checks its arguments and chooses the implementation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend, triton_refusal
from sparsetrain_kernels.list_decode import library  # noqa: F401  (defines the operation)
from sparsetrain_kernels.list_decode.inputs import check_listed_inputs


@overload
def listed_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lists: Tensor,
    counts: Tensor,
    *,
    lengths: Tensor,
    block_table: Tensor,
    sinks: int = 0,
    recent: int | Tensor = 0,
    since: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def listed_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lists: Tensor,
    counts: Tensor,
    *,
    lengths: Tensor,
    block_table: Tensor,
    sinks: int = 0,
    recent: int | Tensor = 0,
    since: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def listed_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lists: Tensor,
    counts: Tensor,
    *,
    lengths: Tensor,
    block_table: Tensor,
    sinks: int = 0,
    recent: int | Tensor = 0,
    since: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of sequences over listed keys of a paged cache, as Twilight's last step needs it
    (2502.02770, section 4.2).

    Row ``r`` of sequence ``b`` is the token at position ``lengths[b] - rows + r``. It reads, up to its own position,
    the first ``sinks`` tokens, the last ``recent`` of the sequence, and those that its KV head lists. No list names a
    position twice or one that is attended in any case: it would count twice, and nothing looks for it.
    :func:`top_p_lists` makes such lists. Positions whose page is not kept are left out; nothing else of the cache is
    read. Logits, softmax and accumulation are fp32 (fp64 for fp64 inputs). For inference: it has no gradient.

    The kernels divide the keys of all lists evenly among programs, however they are spread over heads and sequences.
    They read nothing on the host, and no shape depends on a value, so that a call can be captured in a CUDA graph
    (after one call outside of it). Parts are merged in a fixed order: equal calls have equal bits.

    Args:
        query: ``[B, Hq, rows, D]`` with 1 to 16 rows.
        key_cache, value_cache: ``[pages, Hkv, page_size, D]``, of consecutive elements in the last dimension; query
            head ``h`` reads KV head ``h // (Hq // Hkv)``.
        lists: int32 ``[B, Hkv, capacity]``, positions; what lies behind the count is not looked at.
        counts: int32 ``[B, Hkv]``, the entries of each list.
        lengths: int32 ``[B]``, the tokens of each sequence, the new ones included, which are in the cache already.
        block_table: int32 ``[B, max_pages]``, the page of each ``page_size`` consecutive positions of a sequence; below
            0 where none is kept.
        sinks: tokens at the start that every row attends to.
        recent: tokens at the end, the new ones among them, that every row attends to up to its own; a number, or int32
            ``[B]``.
        since: int32 ``[B]``, the tokens of each sequence when its lists were made: those that have come since are
            attended too, beside ``recent`` others before them. None means that none have.
        scale: factor on the logits; None means ``D ** -0.5``.
        softcap: ``softcap * tanh(logits / softcap)`` where given.
        sink_logits: ``[Hq]``, one more logit a row that takes part in the softmax denominator only.
        return_lse: also return the log of the softmax denominator (the sink included).
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch, which reads
            ``lengths`` on the host), or ``auto``: on CUDA the first that can run the call, else the last.

    Returns:
        ``[B, Hq, rows, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, rows]`` (fp64 for fp64
        inputs). Rows that see no key are zeros.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    inputs = check_listed_inputs(
        query,
        key_cache,
        value_cache,
        lists,
        counts,
        lengths=lengths,
        block_table=block_table,
        sinks=sinks,
        recent=recent,
        since=since,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    refusals = {"triton": triton_refusal(query), "gluon": "decoding has plain Triton kernels only"}
    out, lse = torch.ops.sparsetrain.listed_decode(*inputs, choose_backend(backend, query, refusals))
    return (out, lse) if return_lse else out
