"""The interface of an implementation in benchmarks: it prepares a problem, or reports that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from sparsetrain.bench.problem import Tensors
from sparsetrain.errors import BenchError

Attention = Callable[..., Tensor]


class Layout(NamedTuple):
    """The tensor layout of an implementation: conversion from and to ``[batch, heads, tokens, head_dim]``."""

    arrange: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]


HEADS_FIRST = Layout(lambda tensor: tensor, lambda tensor: tensor)
TOKENS_FIRST = Layout(lambda tensor: tensor.transpose(1, 2).contiguous(), lambda tensor: tensor.transpose(1, 2))
PACKED = Layout(lambda tensor: tensor[0].transpose(0, 1).contiguous(), lambda tensor: tensor.transpose(0, 1)[None])
PACKED_STEP = Layout(
    lambda tensor: tensor.transpose(1, 2).flatten(0, 1).contiguous(), lambda tensor: tensor[:, :, None]
)
"""Sequences after one another, ``[batch * tokens, heads, head_dim]``; of the output, one token of each."""


@dataclass(frozen=True)
class Prepared:
    """An implementation that is ready for one problem."""

    attend: Attention
    """From query, key and value, all in ``layout``, to the output; from the scores too where there is ``select``."""
    layout: Layout = HEADS_FIRST
    repeat: int = 1
    """Number of copies of each KV head, for an implementation without GQA."""
    mask_ms: float | None = None
    """Time to build the mask once everything is compiled."""
    mask_mib: float | None = None
    """Memory allocated at the peak of building it."""
    select: Callable[[Tensor], Tensor] | None = None
    """The part of ``attend`` that selects keys, from scores to something with a gradient that has their shape."""
    parts: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Parts of ``attend`` and its gradient, from the same arguments; each fills the column of its name in a row."""
    note: str = ""
    steps: int = 1
    """Calls of ``attend`` that differ, after which they come again; of decoding steps that are not all alike."""
    visible: Callable[[], Tensor] | None = None
    """The keys that a step reads, bool ``[batch, kv_heads, length]``, where it chooses them by their values."""
    beside: float = 0
    """Bytes that such a step reads beside keys and values, to choose."""

    def leaves(self, tensors: Tensors) -> tuple[list[Tensor], Tensor]:
        """The arguments of ``attend``, requiring gradients, and the gradient of the output.

        All are in the implementation's layout; query and output from ``[batch, heads, tokens, head_dim]``.
        """
        query, key, value, upstream, scores = tensors
        if self.repeat > 1:
            key, value = (tensor.repeat_interleave(self.repeat, 1) for tensor in (key, value))
        inputs = [self.layout.arrange(tensor).detach().requires_grad_() for tensor in (query, key, value)]
        if self.select is not None and scores is not None:
            inputs.append(scores.detach().requires_grad_())
        return inputs, self.layout.arrange(upstream)


@dataclass(frozen=True)
class Contender:
    """An implementation to compare; ours is one of them."""

    name: str
    title: str
    reads: str
    """``all`` keys before a token, the ``blocks`` that the pattern lists, those that SparseK has ``selected``, or those
    ``chosen`` by their values."""
    prepare: Callable[[Any, Any], Prepared]
    """From a problem and its tensors. Raises whatever goes wrong, :class:`Unavailable` where the machine lacks
    something."""
    devices: tuple[str, ...] = ("cuda",)
    packed: tuple[bool, ...] = (False, True)
    """Whether it takes single sequences, packed documents, or both."""

    @property
    def sparse(self) -> bool:
        """Whether it leaves keys out."""
        return self.reads != "all"


def fitting(known: Collection[Contender], device: str, packed: bool = False) -> dict[str, Contender]:
    """The contenders that can be measured on ``device``, by name."""
    return {each.name: each for each in known if device in each.devices and packed in each.packed}


def choose(text: str, fits: Mapping[str, Contender], known: Collection[Contender], here: str) -> tuple[Contender, ...]:
    """``--opponents``, without repeats.

    Args:
        here: The place where the others cannot be measured, such as ``on cpu``.

    Raises:
        BenchError: a name is not known or does not fit.
    """
    names = list(fits) if text == "all" else list(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in fits:
            unknown = name not in {each.name for each in known}
            fault = f"{name!r} is not known" if unknown else f"{name} cannot be measured {here}"
            raise BenchError(f"--opponents {fault}; choose from {', '.join(fits)}, or all")
    return tuple(fits[name] for name in names)
