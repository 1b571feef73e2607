"""How much text a prompt may have: NVIDIA's binary search, which here ends where nothing fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.draws import Draws


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers."""

    text: str
    """What the user says."""
    prefix: str
    """How the answer begins, which the model goes on from."""
    references: list[str]
    """The answers."""
    others: Sequence[Sample] = field(default=(), kw_only=True)
    """Other questions about the same text, which stand in the place of this one."""


@dataclass(frozen=True)
class Room:
    """The tokens that a prompt may have."""

    count: Callable[[Sample], int]
    """Tokens of text and prefix, without BOS and what a chat template adds."""
    most: int
    """Tokens for text, prefix and answer together."""
    budget: int
    """Of these, those of the answer."""
    overhead: int
    """Tokens of BOS and the chat template, which are not among them."""

    def fits(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens leaves room for the answer."""
        return tokens + self.budget <= self.most


class NoRoom(DataError):
    """The shortest prompt does not fit."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"{tokens:,} tokens are too many")
        self.tokens = tokens


FULL = 0.95
"""Share of its tokens above which a prompt is as long as asked for."""


class Maker(ABC):
    """Makes the prompts of one task, of more or fewer units: words, lines, documents.

    The search draws prompts as the samples do, so that NVIDIA's order of draws is kept (``mirror``).
    """

    step: int
    """Units that NVIDIA's scripts begin with, and take away from a sample that turned out too long."""
    fewest: int = 1
    """Units without which there is no prompt."""
    beside: int = 0
    """Tokens of the sample that a trial lacks."""

    @abstractmethod
    def trial(self, units: int, draws: Draws) -> Sample:
        """A prompt to measure."""

    def sample(self, index: int, units: int, draws: Draws) -> Sample:
        """The prompt with a number."""
        return self.trial(units, draws)

    def measured(self) -> int:
        """Units of the trial that says how many tokens a unit takes."""
        return self.step

    def bound(self, most: int, tokens_per_unit: float) -> int:
        """Units that are certainly too many: three times the estimate, since draws differ."""
        return int(most / tokens_per_unit * 3)

    def units(self, room: Room, draws: Draws) -> int:
        """The most units whose trial fits; :attr:`fewest` where none does."""
        first = self.measured()
        bound = self.bound(room.most, room.count(self.trial(first, draws)) / first)
        low = max(self.step, self.fewest)
        return (
            self._search(room, draws, low, max(bound, 2 * self.step))
            or self._search(room, draws, self.fewest, low - 1)
            or self.fewest
        )

    def fitted(self, index: int, units: int, room: Room, draws: Draws) -> Sample:
        """The prompt with a number, of fewer units where so many are too long, and of more where that leaves much room.

        Raises:
            NoRoom: even :attr:`fewest` are too long.
        """
        return self.fit(lambda count: self.sample(index, count, draws), units, room, draws)

    def fit(self, make: Callable[[int], Sample], units: int, room: Room, draws: Draws) -> Sample:
        """What ``make`` makes of about so many units. NVIDIA's scripts take steps, and never more units.

        Raises:
            NoRoom: even :attr:`fewest` are too long.
        """
        tokens = room.count(sample := make(units))
        target = room.most - room.budget
        if not draws.mirror and tokens < FULL * target:
            units = units * target // tokens
            tokens = room.count(sample := make(units))
        while tokens > target:
            if units <= self.fewest:
                raise NoRoom(tokens + room.budget + room.overhead)
            less = self.step if draws.mirror and units > self.step else max(1, units * (tokens - target) // tokens)
            units = max(self.fewest, units - less)
            tokens = room.count(sample := make(units))
        return sample

    def _search(self, room: Room, draws: Draws, low: int, high: int) -> int | None:
        best = None
        while low <= high:
            middle = (low + high) // 2
            if room.fits(room.count(self.trial(middle, draws)) + self.beside):
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best
