"""What the benchmarks of attention have in common: a shape, implementations to compare, and how to measure them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Generic

import torch

from sparsetrain.bench.attention_opponents import Opponent, P
from sparsetrain.errors import BenchError

MAX_CHECKED = 8192
"""Tokens of the comparison with the oracle, which builds the whole mask."""


@dataclass(frozen=True)
class AttentionBench(ABC, Generic[P]):
    """One benchmark, of problems of one kind."""

    device: torch.device
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int
    opponents: tuple[Opponent[P], ...]
    budget_ms: float
    """Time to repeat each measurement for, in ms."""
    check: bool

    @property
    @abstractmethod
    def ours(self) -> Opponent[P]:
        """The implementation that the other sparse ones are compared with."""

    @property
    @abstractmethod
    def subject(self) -> str:
        """What is measured, for the title of a picture."""

    @abstractmethod
    def problem(self, length: int) -> P:
        """The problem at ``length`` tokens."""

    @abstractmethod
    def check_problem(self) -> P:
        """A short problem that has everything a long one has."""

    def facts(self) -> dict[str, object]:
        """The options as they are recorded with the results."""
        return {
            "subject": self.subject,
            "device": self.device.type,
            "lengths": list(self.lengths),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "opponents": [each.name for each in self.opponents],
            "budget_ms": self.budget_ms,
            "check": self.check,
        }


def choose_opponents(
    text: str, fitting: Mapping[str, Opponent[P]], known: Collection[str], here: str
) -> tuple[Opponent[P], ...]:
    """``--opponents``, without repeats.

    Args:
        fitting: those that can be measured, by name.
        known: the names of all.
        here: where the others cannot be measured, as in ``on cpu``.

    Raises:
        BenchError: a name is not known or does not fit.
    """
    if text == "all":
        return tuple(fitting.values())
    names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in known:
            raise BenchError(f"--opponents {name!r} is not known; choose from {', '.join(fitting)}, or all")
        if name not in fitting:
            raise BenchError(f"--opponents {name} cannot be measured {here}; choose from {', '.join(fitting)}, or all")
    return tuple(fitting[name] for name in names)
