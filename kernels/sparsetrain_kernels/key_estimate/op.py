"""The public operations: check the arguments and choose the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_tensors
from sparsetrain_kernels.backend import choose_backend, triton_refusal
from sparsetrain_kernels.inputs import check_factors, consecutive_rows
from sparsetrain_kernels.key_estimate import library, reference  # noqa: F401  (the first defines the operations)
from sparsetrain_kernels.key_estimate.inputs import (
    check_due,
    check_estimate_inputs,
    check_heads,
    check_max_length,
    check_query,
)
from sparsetrain_kernels.key_mirror.layout import GRANULE, KeyMirror, PageBounds, check_tensor
from sparsetrain_kernels.key_mirror.op import check_cache, check_places


def estimate_scores(
    query: Tensor,
    mirror: KeyMirror,
    *,
    lengths: Tensor,
    block_table: Tensor,
    max_length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    page_lists: Tensor | None = None,
    page_counts: Tensor | None = None,
    granule: int = GRANULE,
    due: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Logits of the newest query of each sequence with its keys, from the keys' codes (2502.02770, section 4).

    **Scores are logits less the logit of the mean key**, a constant of the row, which changes no softmax and would cost
    precision: ``exp(scores - lse)`` are weights that sum to 1, and ``lse + center_logits(...)`` is an estimate of the
    log-sum-exp of the logits. With ``softcap`` the scores are the capped logits themselves, and
    :func:`center_logits` is 0.

    The query times ``spread`` is rounded to 15 bits of its row's largest channel. Products with the codes and their
    sums are integers, so that they are exact and repeat bit for bit; a score is rounded to fp16 once and bounded by
    fp16's range, and the log-sum-exp is that of the rounded scores.

    With the Triton kernels nothing is read on the host and no shape depends on ``lengths`` or ``page_counts``, so that
    a call can be captured in a CUDA graph (after one call outside of it) and replayed as the lengths grow up to
    ``max_length``. Two launches, or one where keys are few.

    Args:
        query: ``[B, Hq, 1, D]``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        mirror: codes of the keys ``[pages, Hkv, page, D // 2]`` and what they are scaled by; read once a group.
        lengths: int32 ``[B]``, the keys of each sequence. A length above ``max_length`` is an error: the reference
            raises it, the kernels return a ``lse`` of NaN for that sequence.
        block_table: int32 ``[B, max_pages]``, the page of each ``page`` consecutive positions; negative where it is not
            kept, whose tokens score -inf. Entries behind a length are not read.
        max_length: what no length exceeds; None means all that ``block_table`` has pages for.
        scale: factor on the logits; None means ``D ** -0.5``.
        softcap: ``softcap * tanh(logits / softcap)`` where given.
        page_lists: int32 ``[B, Hkv, P]``, in each list the numbers of some of the sequence's groups of ``granule``
            consecutive tokens, none twice. Only those are read: column ``c`` of the scores is then token
            ``c % granule`` of entry ``c // granule``. Negative entries score -inf.
        page_counts: int32 ``[B, Hkv]``, the entries of each list that count.
        granule: tokens of an entry: 16, or 1 for lists of positions.
        due: bool ``[B]``, the sequences that are asked for; None means all. Of others nothing is read or written: what
            is returned of them is undefined.
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch, which reads
            ``lengths`` on the host), or ``auto``: on CUDA the first that can run the call, else the last.

    Returns:
        ``scores``, fp16 ``[B, Hq, max_length]`` in the order of positions, or ``[B, Hq, granule * P]`` in that of the
        lists, -inf where there is no key; and ``lse``, fp32 ``[B, Hq]``, -inf where there is none in the row. Rows are
        written fastest where their length is a multiple of 16.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    inputs = check_estimate_inputs(
        query,
        mirror,
        lengths=lengths,
        block_table=block_table,
        max_length=max_length,
        scale=scale,
        softcap=softcap,
        page_lists=page_lists,
        page_counts=page_counts,
        granule=granule,
        due=due,
    )
    chosen = choose_backend(backend, query, _refusals(query))
    rest = inputs[2:]
    return torch.ops.sparsetrain.estimate_scores(consecutive_rows(query), *mirror, *rest, chosen)


def center_logits(
    query: Tensor, mirror: KeyMirror, *, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """What the scores and the log-sum-exp of :func:`estimate_scores` leave out (2502.02770, section 4, keeps it): the
    logit of the mean key. In plain PyTorch.

    Args:
        query: ``[B, Hq, 1, D]``.
        mirror: its ``center`` is read, ``[B, Hkv, D]``.
        scale: as there.
        softcap: as there; where it is given, nothing is left out.

    Returns:
        fp32 ``[B, Hq]``.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    _, kv_heads, _, head_dim = mirror.check(check_query(query), query.device)
    check_heads(query, kv_heads, head_dim, "codes")
    check_factors(scale, softcap)
    if softcap is not None:
        return torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device)
    return reference.center_logits(query, mirror, head_dim**-0.5 if scale is None else float(scale))


def page_scores(
    query: Tensor,
    bounds: PageBounds,
    *,
    lengths: Tensor,
    block_table: Tensor,
    max_length: int | None = None,
    scale: float | None = None,
    due: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Upper bounds of the logits of every 16 tokens, from the bounds of their keys (2406.10774, Algorithm 1).

    ``scale * sum_c max(q_c * min_c, q_c * max_c)``, and of the heads that share a KV head the largest: no head of the
    group has a larger logit in these tokens, up to rounding in fp32. The mean key's logit is in it. One launch; nothing
    is read on the host.

    Args:
        query: ``[B, Hq, 1, D]`` in the dtype of the keys.
        bounds: of the cache, ``[pages, Hkv, page // 16, 2, D]``.
        lengths: int32 ``[B]``, the keys of each sequence. The reference raises a length above ``max_length``.
        block_table: int32 ``[B, max_pages]``, as for :func:`estimate_scores`.
        max_length: what no length exceeds; None means all that ``block_table`` has pages for.
        scale: factor on the logits; None means ``D ** -0.5``.
        due: bool ``[B]``, as there.
        dtype: of the result, fp32, or fp16 as :func:`top_k_lists` takes it, which rounds the bounds.
        backend: as there.

    Returns:
        ``[B, Hkv, ceil(max_length / 16)]``, bounded by fp16's range; -inf where there is no token. The largest,
        as :func:`top_k_lists` lists them, are ``page_lists`` of :func:`estimate_scores`.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    batch = check_query(query)
    if not isinstance(bounds, PageBounds):
        raise TypeError(f"bounds is a {type(bounds).__name__}, expected PageBounds")
    _, kv_heads, page, head_dim = bounds.check(batch, query.dtype, query.device)
    check_heads(query, kv_heads, head_dim, "bounds")
    check_places(lengths, block_table, batch, query.device)
    check_due(due, query)
    max_length = check_max_length(max_length, block_table, page)
    check_factors(scale, None)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype={dtype} must be torch.float32 or torch.float16")
    scale = head_dim**-0.5 if scale is None else float(scale)
    chosen = choose_backend(backend, query, _refusals(query))
    granules = -(-max_length // GRANULE)
    return torch.ops.sparsetrain.page_scores(
        consecutive_rows(query), *bounds, lengths, block_table, granules, scale, due, dtype, chosen
    )


def key_weights(
    query: Tensor,
    key_cache: Tensor,
    lse: Tensor,
    *,
    lengths: Tensor,
    block_table: Tensor,
    max_length: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    due: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logarithms of the weights that the newest query of each sequence gives its keys (2411.05787, section 3), exact.

    ``logit - lse`` in fp32, rounded to fp16 once: what :func:`top_k_lists` and :func:`top_p_lists` choose by, with a
    ``lse`` of 0, as :func:`top_k_keys` does for rows of training. One launch; nothing is read on the host.

    Args:
        query: ``[B, Hq, 1, D]`` in the dtype of the keys.
        key_cache: ``[pages, Hkv, page, D]``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        lse: fp32 ``[B, Hq]``, the log-sum-exp of each row's logits.
        lengths: int32 ``[B]``, the keys of each sequence.
        block_table: int32 ``[B, max_pages]``, the page of each ``page`` consecutive positions; negative where it is not
            kept, whose tokens get -inf.
        max_length: what no length exceeds; None means all that ``block_table`` has pages for.
        scale: factor on the logits; None means ``D ** -0.5``.
        softcap: ``softcap * tanh(logits / softcap)`` where given.
        due: bool ``[B]``, the sequences that are asked for; None means all. Of others nothing is read or written.
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch), or ``auto``.

    Returns:
        fp16 ``[B, Hq, max_length]``. What stands behind a length is undefined.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    batch = check_query(query)
    check_tensors(key_cache=key_cache, lse=lse)
    _, kv_heads, page, head_dim = check_cache(key_cache, key_cache)
    check_heads(query, kv_heads, head_dim, "key_cache")
    if (key_cache.dtype, key_cache.device) != (query.dtype, query.device):
        raise TypeError(
            f"key_cache is {key_cache.dtype} on {key_cache.device}, expected {query.dtype} on {query.device}"
        )
    check_tensor("lse", lse, query.shape[:2], torch.float32, query.device, strided=True)
    check_places(lengths, block_table, batch, query.device)
    check_due(due, query)
    max_length = check_max_length(max_length, block_table, page)
    check_factors(scale, softcap)
    scale = head_dim**-0.5 if scale is None else float(scale)
    chosen = choose_backend(backend, query, _refusals(query))
    places = (lengths, block_table, max_length, scale, softcap, due)
    return torch.ops.sparsetrain.key_weights(consecutive_rows(query), key_cache, lse, *places, chosen)


def _refusals(tensor: Tensor) -> dict[str, str | None]:
    return {"triton": triton_refusal(tensor), "gluon": "estimates have plain Triton kernels only"}
