"""What steps that choose their keys say of themselves: counters on the device, which captured steps add to as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

MASS_EVERY = 64
"""Steps between two measurements of the weight that was read, while observing."""

_EVERY: ContextVar[int] = ContextVar("observing", default=0)


@contextmanager
def observing(every: int = MASS_EVERY) -> Iterator[None]:
    """Within it each step counts what it reads, and every so many of them, the first included, measure its weight. 0
    counts nothing."""
    token = _EVERY.set(every)
    try:
        yield
    finally:
        _EVERY.reset(token)


def is_observing() -> bool:
    """Whether a step counts what it reads. Compiled ones do not."""
    return not torch.compiler.is_compiling() and _EVERY.get() > 0


class Observations:
    """Of one layer: keys read, held and dropped, and the softmax weight that was read, over the observed steps."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # read, held, dropped: int64 [3]
        self._masses: Tensor | None = None  # sum, number and least of the shares of weight: fp64 [3]
        self._steps = 0

    def reset(self) -> None:
        """Forget all steps. The counters stay where they are."""
        self._steps = 0
        if self._counts is not None and self._masses is not None:
            self._counts.zero_()
            self._masses.copy_(_nothing(self._masses.device))

    def held(self) -> tuple[Tensor | None, Tensor | None]:
        """The counters, ``[3]`` each; None before the first step."""
        return self._counts, self._masses

    def count(self, *, read: Tensor, held: Tensor) -> bool:
        """Count a step.

        Args:
            read: keys that were read, integers of any shape ``[...]`` to be added up.
            held: keys that there were, likewise.

        Returns:
            Whether to measure the weight of this step.
        """
        self._add(0, read)
        self._add(1, held)
        self._steps += 1
        return (self._steps - 1) % _EVERY.get() == 0

    def drop(self, keys: Tensor) -> None:
        """Count keys for which a list had no room, integers ``[...]``."""
        self._add(2, keys)

    def weigh(self, shares: Tensor) -> None:
        """Take in shares of the softmax weight that were read, fp32 ``[...]``."""
        _, masses = self._made(shares.device)
        wide = shares.double()
        masses[0] += wide.sum()
        masses[1] += shares.numel()
        masses[2].copy_(torch.minimum(masses[2], wide.min()))

    def statistics(self) -> dict[str, float]:
        """As of :meth:`~sparsetrain.generation.listed.ListedMemory.observations`. Waits for the device."""
        if self._counts is None or self._masses is None:
            return {}
        read, held, dropped = self._counts.tolist()
        found = {"kept": read / held, "dropped": dropped / held} if held else {}
        total, number, least = self._masses.tolist()
        return found | ({"mass_min": least, "mass_mean": total / number} if number else {})

    def _add(self, place: int, keys: Tensor) -> None:
        counts, _ = self._made(keys.device)
        counts[place] += keys.sum()

    def _made(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._masses is None:
            self._counts = torch.zeros(3, dtype=torch.int64, device=device)
            self._masses = _nothing(device).clone()
        return self._counts, self._masses


def _nothing(device: torch.device) -> Tensor:
    return torch.tensor([0.0, 0.0, float("inf")], dtype=torch.float64).to(device)
