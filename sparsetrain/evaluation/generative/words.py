"""Words for keys and lists: a user's, or made of syllables, so that nothing has to be shipped or fetched."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from random import Random

from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.draws import MIRRORED
from sparsetrain.textfile import text_lines

FILES = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}
"""The lists of the package wonderwords, which NVIDIA's scripts use: a word a line."""
FEWEST_PAIRS = 1000
"""Keys below which prompts would share theirs."""
TWO_SYLLABLES = 50_000
"""Made-up words of two syllables, before those of three: more than half of the 88,200 that there are."""

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "v",
    "w",
)
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("n", "l", "r", "m", "nd", "st", "rt", "x")


class Pairs(Sequence[str]):
    """The distinct ``adjective-noun`` in sorted order, without the list of millions that they are."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._groups: list[tuple[str, list[str] | None]] = []
        for adjective in sorted(set(adjectives), key=lambda each: f"{each}-"):
            root = self._groups[-1][0] if self._groups else None
            if root is None or not f"{adjective}-".startswith(f"{root}-"):
                self._groups.append((adjective, None))
                continue
            # The words of "far-off" stand among those of "far".
            merged = self._groups[-1][1] or self._with(root)
            self._groups[-1] = (root, sorted({*merged, *self._with(adjective)}))
        sizes = (len(self._nouns if merged is None else merged) for _, merged in self._groups)
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        adjective, merged = self._groups[group]
        place = index - (self._ends[group - 1] if group else 0)
        return f"{adjective}-{self._nouns[place]}" if merged is None else merged[place]

    def _with(self, adjective: str) -> list[str]:
        return [f"{adjective}-{noun}" for noun in self._nouns]


@dataclass(frozen=True)
class Words:
    """Nouns, adjectives and verbs."""

    nouns: list[str]
    adjectives: list[str]
    verbs: list[str]

    @cached_property
    def pairs(self) -> Pairs:
        """Keys."""
        return Pairs(self.adjectives, self.nouns)

    @cached_property
    def pool(self) -> list[str]:
        """All of them, each once, in one random order."""
        words = sorted({*self.nouns, *self.adjectives, *self.verbs})
        Random(MIRRORED).shuffle(words)
        return words

    def at_least(self, count: int) -> list[str]:
        """The pool; where ``count`` is more, made-up words join it."""
        missing = count - len(self.pool)
        if missing <= 0:
            return self.pool
        self._made.extend(islice(self._more, max(0, missing - len(self._made))))
        return self.pool + self._made[:missing]

    @cached_property
    def _made(self) -> list[str]:
        return []

    @cached_property
    def _more(self) -> Iterator[str]:
        known = set(self.pool)
        return (word for word in made_up() if word not in known)

    @classmethod
    def read(cls, folder: Path, called: str) -> Words:
        """The user's lists, in :data:`FILES`.

        Raises:
            DataError: one cannot be read, or they are too short.
        """
        lists = {kind: _lines(folder / name, f"{called}: {folder / name}") for kind, name in FILES.items()}
        words = cls(**lists)
        if len(words.pairs) < FEWEST_PAIRS:
            raise DataError(
                f"{called}: {folder} gives {len(words.pairs):,} keys (an adjective and a noun each), fewer than "
                f"{FEWEST_PAIRS:,}; give longer lists"
            )
        return words

    @classmethod
    def made(cls) -> Words:
        """Made-up ones, always the same."""
        words = made_up()
        return cls(*(list(islice(words, count)) for count in (6000, 1000, 1000)))


def made_up() -> Iterator[str]:
    """Endless distinct words of a few syllables, always the same ones."""
    choice = Random(MIRRORED).choice
    seen: set[str] = set()
    while True:
        syllables = 2 if len(seen) < TWO_SYLLABLES else 3
        word = "".join(choice(_ONSETS) + choice(_VOWELS) for _ in range(syllables)) + choice(_CODAS)
        if word not in seen:
            seen.add(word)
            yield word


def _lines(path: Path, called: str) -> list[str]:
    return [word for line in text_lines(path, called, DataError) if (word := line.strip())]
