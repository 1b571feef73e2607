"""The memory that a layer gets: its method's own, or pages made from its pattern."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sparsetrain_kernels.dense import causal_attention
from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.generation.composition import attention_kind
from sparsetrain.generation.limits import Limits
from sparsetrain.generation.listed import ListedMemory
from sparsetrain.generation.offloaded import OffloadedMemory
from sparsetrain.generation.page_table import page_table
from sparsetrain.generation.pages import ROLLBACK, PagedMemory
from sparsetrain.generation.pages_by_head import PagesByHead
from sparsetrain.generation.settings import Decode
from sparsetrain.generation.slots import SlotPruning
from sparsetrain.methods.base import Method
from sparsetrain.methods.memory import Memory
from sparsetrain.methods.sparsek.memory import SparseKMemory
from sparsetrain.methods.static import StaticMethod
from sparsetrain.patterns import FullPattern, SlidingPattern

PAGE = 256
"""Tokens in a page of full attention."""


def make_memory(
    method: Method | None,
    window: int | None,
    *,
    max_length: int | None = None,
    rollback: int = ROLLBACK,
    limits: Limits | None = None,
    decode: Decode | None = None,
    index: int = 0,
    listed: Callable[..., ListedMemory] = ListedMemory,
) -> Memory:
    """An empty memory.

    Args:
        method: how the layer attends; None where it stays as the model made it.
        window: its sliding window in tokens, where it stays as the model made it.
        max_length, rollback: as in :class:`~sparsetrain.generation.pages.PagedMemory`.
        limits: of a cache with a ``max_length``; the layer takes those that its attention allows.
        decode: what a step reads of the layer's keys; None means all.
        index: of the layer.
        listed: makes the memory in pages that has a ``decode``.

    Raises:
        ModelError: the budget is less than the layer keeps of any text.
    """
    allowed = (limits or Limits()).of(attention_kind(method, window))
    room: dict[str, Any] = {"max_length": max_length, "rollback": rollback, "budget": allowed.budget}
    choosing = None if decode is None else partial(listed, decode=decode, index=index, **room)
    if method is None or method.decodes_all:
        return _of_every_key(window if method is None else None, choosing, room)
    own = method.memory()
    if own is not None:
        return _own(own, allowed, decode, index, static=max_length is not None and rollback == 0)
    if isinstance(method, StaticMethod) and type(method).attend is StaticMethod.attend:
        return _of_pattern(method, allowed, choosing, room)
    decodes = method.dense and not method.extra_inputs
    if decodes and choosing is not None:
        return choosing(FullPattern(PAGE), method.attend)
    return PagedMemory(FullPattern(PAGE), method.attend, decodes=decodes, **room)


def _of_every_key(
    window: int | None, choosing: Callable[..., ListedMemory] | None, room: dict[str, Any]
) -> PagedMemory:
    """Pages of all keys, made by ``choosing`` if steps choose among them, or those of a sliding window."""

    def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return causal_attention(query, key, value, window=window, **options)

    if window is None and choosing is not None:
        return choosing(FullPattern(PAGE), attend)
    if window is None:
        return PagedMemory(FullPattern(PAGE), attend, **room)
    page = 64 if window >= 64 else 16
    return PagedMemory(SlidingPattern(page, -(-(window - 1) // page) + 1, 0), attend, window=window, **room)


def _own(own: Memory, allowed: Limits, decode: Decode | None, index: int, *, static: bool) -> Memory:
    """The memory that a method makes itself."""
    if allowed.budget is not None and own.most is not None and own.most > allowed.budget:
        raise ModelError(
            f"budget={allowed.budget}: the attention method keeps {own.most} tokens of a row; set budget to "
            f"{own.most} or more, or to auto"
        )
    own.static = static
    if decode is not None and isinstance(own, SparseKMemory):
        own.choose = SlotPruning(decode, index)
    return own


def _of_pattern(
    method: StaticMethod, allowed: Limits, choosing: Callable[..., ListedMemory] | None, room: dict[str, Any]
) -> Memory:
    """Pages of a block pattern, made by ``choosing`` if its steps choose among their keys."""
    pattern = method.pattern
    if choosing is not None and allowed.offload:
        raise ModelError(
            "offload: layers that prune the keys of their own pattern (decode.select=own) keep them on the device; "
            "drop offload, or decode (set_decode)"
        )
    if choosing is not None:
        return choosing(pattern, method.attend)
    if allowed.offload and room["max_length"] is not None:
        return OffloadedMemory(pattern, method.attend, max_length=room["max_length"], budget=allowed.budget)
    if pattern.by_head:
        return PagesByHead(pattern.by_head, **room)
    return PagedMemory(pattern, method.attend, **room)


def kept_tokens(memory: Memory, prompt: int, max_length: int) -> int | None:
    """Tokens whose keys and values an empty memory will have room for behind a prompt, the mean where heads differ;
    None where it does not say.

    Args:
        prompt: tokens of the prompt.
        max_length: tokens of prompt and text together.
    """
    if memory.most is not None:
        return memory.most
    if isinstance(memory, PagesByHead):
        each = [kept_tokens(part, prompt, max_length) or 0 for part in memory.parts]
        return sum(heads * tokens for heads, tokens in zip(memory.heads, each, strict=True)) // sum(memory.heads)
    if not isinstance(memory, PagedMemory):
        return None
    block = memory.pattern.block
    pages = -(-max_length // block)
    return block * page_table(memory.pattern, pages, prompt=prompt // block, horizon=pages).needed
