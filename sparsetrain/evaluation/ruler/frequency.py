"""Which words are most frequent: in a list of words (RULER's ``cwe``), and in a text of coded words (``fwe``)."""

from __future__ import annotations

import math
import string

from sparsetrain.evaluation.generative.draws import Draws
from sparsetrain.evaluation.generative.fit import Maker, Room, Sample
from sparsetrain.evaluation.generative.words import Words
from sparsetrain.evaluation.ruler.niah import SHORT

LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"

COMMON = 10
"""Words of the list that are asked for."""
NOISE_WORD = "..."
ZETA_2 = math.pi**2 / 6
LETTERS = 6
"""Letters of a coded word."""
FEWEST_CODED = 53
"""From so many words on the fourth rank is more frequent than the fifth, so that three answers are right."""


class CommonWordsMaker(Maker):
    """Makes lists in which ten words are more frequent than the others, behind a solved example."""

    step = 10
    fewest = COMMON

    def __init__(self, length: int, words: Words) -> None:
        self._words = words
        # Distinct words of the example, and how often common words and others are listed there and in the list itself.
        self._example, self._often = ((40, 10, 3), (30, 3)) if length >= SHORT else ((20, 3, 1), (6, 1))

    def measured(self) -> int:
        """As many as NVIDIA's scripts try first."""
        return 4096

    def bound(self, most: int, tokens_per_unit: float) -> int:
        """Twice the estimate."""
        return int(most // tokens_per_unit) * 2

    def trial(self, units: int, draws: Draws) -> Sample:
        """A list of so many distinct words."""
        example, solved = self._list(*self._example, draws)
        context, common = self._list(units, *self._often, draws)
        answer = " ".join(_numbered(solved))
        shown = f"{LIST.format(context=example)}{LIST_PREFIX} {answer}\n"
        return Sample(shown + LIST.format(context=context), LIST_PREFIX, common)

    def _list(self, distinct: int, often: int, seldom: int, draws: Draws) -> tuple[str, list[str]]:
        words = draws.random.sample(self._words.at_least(distinct), distinct)
        common, others = words[:COMMON], words[COMMON:]
        return " ".join(_numbered(draws.shuffled(common * often + others * seldom))), common


class FrequentWordsMaker(Maker):
    """Makes texts of coded words, of which rank r appears in proportion to 1 / r²; the first rank is noise.

    The units are words. Their number is found by steps of a 32nd of the length, as by NVIDIA's scripts: a dozen.
    """

    fewest = FEWEST_CODED

    def __init__(self, room: Room) -> None:
        self._tokens = room.most - room.budget
        self.step = max(1, self._tokens // 32)

    def trial(self, units: int, draws: Draws) -> Sample:
        """A text of so many words."""
        return self._text(units, self._vocabulary(self._tokens // 50, draws), draws)

    def units(self, room: Room, draws: Draws) -> int:
        """The most words that fit, in steps."""
        vocabulary = self._vocabulary(self._tokens // 50, draws)
        words = self._tokens // LETTERS
        while room.count(self._text(words, vocabulary, draws)) < self._tokens:
            words += self.step
        return words - self.step

    def fitted(self, index: int, units: int, room: Room, draws: Draws) -> Sample:
        """A text of a vocabulary of its own, which does not change where another number of words is tried.

        Raises:
            NoRoom: even :data:`FEWEST_CODED` words are too long.
        """
        vocabulary = self._vocabulary(self._tokens // 50, draws)
        return self.fit(lambda words: self._text(words, vocabulary, draws), max(units, self.fewest), room, draws)

    def _vocabulary(self, size: int, draws: Draws) -> list[str]:
        size = max(size, 4)
        words = {self._coded(draws) for _ in range(size)}
        while len(words) < size:
            words.add(self._coded(draws))
        return [NOISE_WORD, *draws.shuffled(sorted(words))[1:]]

    def _coded(self, draws: Draws) -> str:
        return "".join(draws.random.choices(string.ascii_lowercase, k=LETTERS))

    def _text(self, units: int, vocabulary: list[str], draws: Draws) -> Sample:
        words = [
            word
            for rank, word in enumerate(vocabulary, start=1)
            for _ in range(int(units * float(rank) ** -2.0 / ZETA_2))
        ]
        return Sample(CODED.format(context=" ".join(draws.shuffled(words))), CODED_PREFIX, vocabulary[1:4])


def _numbered(words: list[str]) -> list[str]:
    return [f"{number}. {word}" for number, word in enumerate(words, start=1)]
