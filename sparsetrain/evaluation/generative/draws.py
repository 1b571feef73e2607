"""What is random in the prompts: one generator for each, or NVIDIA's one for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import TypeVar

import numpy as np

from sparsetrain.randomness import generator

T = TypeVar("T")

MIRRORED = 42
"""NVIDIA's seed."""


class Draws:
    """The generators that a prompt is drawn with.

    Args:
        seed: of everything that is not shuffled.
        shuffle_seed: of every shuffle anew: two lists of one length are shuffled alike.
        mirror: whether prompts are to be those of NVIDIA's scripts.
    """

    def __init__(self, seed: int, shuffle_seed: int, *, mirror: bool) -> None:
        self.random = Random(seed)
        self.more = Random(seed + 1)
        """For what is asked beside the first question, which therefore does not change."""
        self.mirror = mirror
        self._numbers = np.random.RandomState(seed)
        self._shuffle_seed = shuffle_seed

    def five_digits(self) -> str:
        """A number of five digits; from numpy, as NVIDIA's."""
        return str(self._numbers.randint(10000, 99999))

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """The items in another order."""
        items = list(items)
        Random(self._shuffle_seed).shuffle(items)
        return items


Seeding = Callable[[int | str], Draws]
"""The draws of a sample by its index, or of what comes before the samples by a name."""


def draws_of_samples(seed: int, task: str, length: int) -> Seeding:
    """Draws of its own for each sample: it depends on no other, and not on how many there are."""

    def draws(key: int | str) -> Draws:
        seeds = generator(seed, "ruler", task, length, key).integers(2**32, size=2).tolist()
        return Draws(*seeds, mirror=False)

    return draws


def mirrored_draws() -> Seeding:
    """NVIDIA's: one generator for the search and then for all samples in their order, and every shuffle the same."""
    shared = Draws(MIRRORED, MIRRORED, mirror=True)
    return lambda key: shared
