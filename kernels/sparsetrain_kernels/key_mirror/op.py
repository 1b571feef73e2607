"""The public operations: check the arguments and choose the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_tensors
from sparsetrain_kernels.backend import choose_backend, triton_refusal
from sparsetrain_kernels.inputs import consecutive_rows
from sparsetrain_kernels.key_mirror import library  # noqa: F401  (defines the operations)
from sparsetrain_kernels.key_mirror.layout import GRANULE, KeyMirror, PageBounds, check_tensor


def append_tokens(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    lengths: Tensor,
    block_table: Tensor,
    mirror: KeyMirror | None = None,
    bounds: PageBounds | None = None,
    backend: str = "auto",
) -> None:
    """Take the newest tokens of each sequence into a paged cache, and their keys into its mirror of 4 bits (2502.02770,
    section 4) and its bounds (2406.10774, Algorithm 1). All change in place.

    The ``N`` tokens of a call are at positions ``lengths[b] - N`` to ``lengths[b] - 1``. Those at negative positions
    are padding, and nothing is written of them; nor of tokens on pages that are not kept.

    With the Triton kernel, one launch; nothing is read on the host and no shape depends on ``lengths``, so that a call
    can be captured in a CUDA graph (after one call outside of it) and replayed as the lengths grow.

    Args:
        key, value: ``[B, Hkv, N, D]`` in the dtype of the cache; one token of a step, or a prompt. A mirror, and the
            Triton kernel, take an even ``D``.
        key_cache, value_cache: ``[pages, Hkv, page, D]``, of consecutive elements in the last dimension.
        lengths: int32 ``[B]``, the tokens of each sequence, the new ones included. A length above ``max_pages * page``
            is an error: the reference raises it, the kernel writes no token beyond.
        block_table: int32 ``[B, max_pages]``, the page of each ``page`` consecutive positions; negative where it is not
            kept.
        mirror: codes of the cache's keys ``[pages, Hkv, page, D // 2]`` and what they are scaled by.
        bounds: the cache's ``[pages, Hkv, page // 16, 2, D]``; ``page`` is then a multiple of 16.
        backend: ``triton`` (fp32, fp16 and bf16, head dim up to 256), ``reference`` (plain PyTorch, which reads
            ``lengths`` on the host), or ``auto``: on CUDA the first that can run the call, else the last.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    check_tensors(key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    for name, tensor in (("key", key), ("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, and a cache has none: call it under torch.no_grad()")
    shape = check_cache(key_cache, value_cache)
    _, kv_heads, page, head_dim = shape
    tokens = key.shape[2] if key.dim() == 4 else 0
    batch = key.shape[0] if tokens else 0
    odd = head_dim % 2 != 0
    if batch == 0 or (odd and mirror is not None):
        raise ValueError(
            f"key has shape {tuple(key.shape)} beside key_cache {tuple(key_cache.shape)}, expected [batch, kv heads, "
            "tokens, head_dim] of at least one sequence and token and, for a mirror, an even head_dim"
        )
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, (batch, kv_heads, tokens, head_dim), key_cache.dtype, key_cache.device, strided=True)
    check_places(lengths, block_table, batch, key.device)
    if mirror is not None and mirror.check(batch, key.device) != shape:
        raise ValueError(f"codes {tuple(mirror.codes.shape)} are not of key_cache {tuple(key_cache.shape)}")
    if bounds is not None:
        if page % GRANULE != 0:
            raise ValueError(f"bounds are of {GRANULE} tokens each, which do not divide the page of {page}")
        if bounds.check(batch, key.dtype, key.device) != shape:
            raise ValueError(f"bounds {tuple(bounds.values.shape)} are not of key_cache {tuple(key_cache.shape)}")
    refusal = f"its kernel takes an even head_dim, not {head_dim}" if odd else triton_refusal(key)
    refusals = {"triton": refusal, "gluon": "appending has a plain Triton kernel only"}
    chosen = choose_backend(backend, key, refusals)
    torch.ops.sparsetrain.append_tokens(
        consecutive_rows(key),
        consecutive_rows(value),
        key_cache,
        value_cache,
        lengths,
        block_table,
        *(mirror or (None,) * len(KeyMirror._fields)),
        *(bounds or (None,) * len(PageBounds._fields)),
        chosen,
    )


def append_codes(
    key: Tensor, mirror: KeyMirror, *, lengths: Tensor, block_table: Tensor, backend: str = "auto"
) -> None:
    """Take the newest keys of each sequence into a mirror alone, in place, such as that of a few channels of each key
    (the label cache of Double Sparsity, 2408.07092, section 3).

    All else is as in :func:`append_tokens`: positions, padding, pages that are not kept, one launch.

    Args:
        key: ``[B, Hkv, N, D]`` with an even ``D``, that of the mirror.
        mirror: codes ``[pages, Hkv, page, D // 2]`` and what they are scaled by.
        lengths: int32 ``[B]``, the tokens of each sequence, the new ones included.
        block_table: int32 ``[B, max_pages]``.
        backend: ``triton``, ``reference`` or ``auto``.

    Raises:
        TypeError, ValueError: an argument does not fit, or requires a gradient; the message names it and its value.
    """
    check_tensors(key=key)
    if torch.is_grad_enabled() and key.requires_grad:
        raise ValueError("key requires a gradient, and a mirror has none: call it under torch.no_grad()")
    if not isinstance(mirror, KeyMirror):
        raise TypeError(f"mirror is a {type(mirror).__name__}, expected a KeyMirror")
    batch = key.shape[0] if key.dim() == 4 else 0
    _, kv_heads, _, head_dim = mirror.check(batch, key.device)
    if batch == 0 or key.shape[2] == 0 or not key.is_floating_point():
        raise ValueError(
            f"key has shape {tuple(key.shape)} of {key.dtype}, expected floats [batch, kv heads, tokens, {head_dim}]"
        )
    check_tensor("key", key, (batch, kv_heads, key.shape[2], head_dim), key.dtype, key.device, strided=True)
    check_places(lengths, block_table, batch, key.device)
    refusals = {"triton": triton_refusal(key), "gluon": "appending has a plain Triton kernel only"}
    chosen = choose_backend(backend, key, refusals)
    torch.ops.sparsetrain.append_codes(consecutive_rows(key), lengths, block_table, *mirror, chosen)


def check_cache(key_cache: Tensor, value_cache: Tensor) -> tuple[int, int, int, int]:
    """The shape of a paged cache.

    Raises:
        TypeError: dtypes or devices differ.
        ValueError: shapes or layouts do not fit.
    """
    if key_cache.dim() != 4 or not key_cache.is_floating_point() or 0 in key_cache.shape:
        raise ValueError(
            f"key_cache has shape {tuple(key_cache.shape)} of {key_cache.dtype}, expected floats [pages, "
            "kv heads, page, head_dim]"
        )
    check_tensor("value_cache", value_cache, key_cache.shape, key_cache.dtype, key_cache.device, strided=True)
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.stride(3) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}: the elements of a key must be consecutive, because a cache is "
                "never copied; make its last stride 1"
            )
    pages, kv_heads, page, head_dim = key_cache.shape
    return pages, kv_heads, page, head_dim


def check_places(lengths: Tensor, block_table: Tensor, batch: int, device: torch.device) -> None:
    """``lengths`` and ``block_table`` are those of ``batch`` sequences.

    Raises:
        TypeError: dtype or device are others.
        ValueError: the shape is another.
    """
    check_tensor("lengths", lengths, (batch,), torch.int32, device, strided=True)
    if not isinstance(block_table, Tensor) or block_table.dim() != 2:
        raise ValueError(f"block_table is {block_table!r}, expected int32 [batch, max_pages]")
    check_tensor("block_table", block_table, (batch, block_table.shape[1]), torch.int32, device, strided=True)
