"""The memory that a layer gets: its method's own, or pages made from its pattern."""

from __future__ import annotations

from typing import Any

from sparsetrain_kernels.dense import causal_attention
from torch import Tensor, nn

from sparsetrain.generation.pages import ROLLBACK, PagedMemory
from sparsetrain.methods.base import Method
from sparsetrain.methods.memory import Memory
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
    max_pages: int | None = None,
) -> Memory:
    """An empty memory.

    Args:
        method: how the layer attends; None where it stays as the model made it.
        window: its sliding window in tokens, where it stays as the model made it.
        max_length, rollback, max_pages: as in :class:`~sparsetrain.generation.pages.PagedMemory`.
    """
    room = {"max_length": max_length, "rollback": rollback, "max_pages": max_pages}
    if method is None:

        def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            return causal_attention(query, key, value, window=window, **options)

        if window is None:
            return PagedMemory(FullPattern(PAGE), attend, **room)  # type: ignore[arg-type]
        page = 64 if window >= 64 else 16
        return PagedMemory(SlidingPattern(page, -(-(window - 1) // page) + 1, 0), attend, window=window, **room)  # type: ignore[arg-type]
    own = method.memory()
    if own is not None:
        own.static = max_length is not None and rollback == 0
        return own
    if isinstance(method, StaticMethod) and type(method).attend is StaticMethod.attend:
        return PagedMemory(method.pattern, method.attend, **room)  # type: ignore[arg-type]
    decodes = method.dense and not method.extra_inputs
    return PagedMemory(FullPattern(PAGE), method.attend, decodes=decodes, **room)  # type: ignore[arg-type]
