"""The public operation: checks its arguments and chooses the implementation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend, triton_refusal
from sparsetrain_kernels.block_decode import library  # noqa: F401  (defines the operation)
from sparsetrain_kernels.block_decode.inputs import check_decode_inputs
from sparsetrain_kernels.block_pattern.pattern import BlockPattern, block_lists


@overload
def block_pattern_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pattern: BlockPattern,
    *,
    lengths: Tensor,
    block_table: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_pattern_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pattern: BlockPattern,
    *,
    lengths: Tensor,
    block_table: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_pattern_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pattern: BlockPattern,
    *,
    lengths: Tensor,
    block_table: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The last rows of ``block_pattern_attention`` for sequences whose keys and values lie in a cache.

    Row ``r`` of sequence ``b`` is the token at position ``lengths[b] - rows + r`` and reads the keys up to its own in
    the blocks that ``pattern`` lists for its block, such as PowerAttention's (2503.03588, Algorithm 1); the rows of a
    call may lie in two blocks. Nothing else of the cache is read. Logits, softmax and accumulation are fp32 (fp64 for
    fp64 inputs). For inference: it has no gradient.

    With the Triton kernels nothing is read on the host and no shape depends on ``lengths``, so that a call can be
    captured in a CUDA graph (after one call outside of it) and replayed as the lengths grow up to ``max_length``.

    Args:
        query: ``[B, Hq, rows, D]`` with 1 to 16 rows, and no more than ``pattern.block``.
        key_cache, value_cache: ``[B, Hkv, M, D]``, or ``[pages, Hkv, page_size, D]`` with ``block_table``, of
            consecutive elements in the last dimension; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        pattern: the lists; hashable. With ``pattern.per_head`` each KV head has its own.
        lengths: int32 ``[B]``, the keys of each sequence, those of the new rows included, which are in the cache
            already. Rows before position 0 give zeros and a log-sum-exp of -inf; with a length of 0 all do. A length
            above ``max_length`` is an error: the reference raises it, the kernels return NaN for that sequence.
        block_table: int32 ``[B, max_pages]``, the page of each ``page_size`` consecutive positions of a sequence;
            entries behind its length are not read. ``page_size`` divides ``pattern.block``.
        max_length: what no length exceeds; None means all that the cache has room for. The work is divided by it.
        scale: factor on the logits; None means ``D ** -0.5``.
        softcap: ``softcap * tanh(logits / softcap)`` where given.
        sink_logits: ``[Hq]``, one more logit a row that takes part in the softmax denominator only.
        window: tokens that a row sees at most, its own included, of those in the listed blocks; None means all.
        return_lse: also return the log of the softmax denominator (the sink included).
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch, which reads
            ``lengths`` on the host), or ``auto``: on CUDA the first that can run the call, else the last.

    Returns:
        ``[B, Hq, rows, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, rows]`` (fp64 for fp64
        inputs).

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    inputs = check_decode_inputs(
        query,
        key_cache,
        value_cache,
        pattern.block,
        lengths=lengths,
        block_table=block_table,
        max_length=max_length,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        window=window,
    )
    lists = block_lists(pattern, -(-inputs.max_length // pattern.block), key_cache.shape[1])
    refusals = {"triton": triton_refusal(query), "gluon": "decoding has plain Triton kernels only"}
    chosen = choose_backend(backend, query, refusals)
    numbers = lists[: lists._fields.index("far_back")]
    out, lse = torch.ops.sparsetrain.block_pattern_decode(*inputs, *numbers, chosen)
    return (out, lse) if return_lse else out


def prepare_block_decode(pattern: BlockPattern, *, max_length: int, num_kv_heads: int, device: torch.device) -> None:
    """Copy to the device what steps of a pattern read beside the cache, where that is not done yet.

    :func:`block_pattern_decode` does it in its first call. Where that call is part of a CUDA graph, the tensor, which
    later calls use again, would lie in the graph's memory.

    Args:
        pattern: as of the steps.
        max_length: as of the steps.
        num_kv_heads: KV heads of the cache.
        device: of the cache.

    Raises:
        ValueError: the pattern has lists of its own for each of another number of KV heads.
    """
    lists = block_lists(pattern, -(-max_length // pattern.block), num_kv_heads)
    if device.type == "cuda":
        # Imported on first use: Triton may be absent.
        from sparsetrain_kernels.block_pattern.triton.work import far_table

        far_table(lists.far, device)
