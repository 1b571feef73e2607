"""Needles in a haystack: eight of RULER's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from uuid import UUID

import numpy as np

from sparsetrain.data.synthetic import NOISE
from sparsetrain.evaluation.generative.draws import Draws
from sparsetrain.evaluation.generative.essay import sentences
from sparsetrain.evaluation.generative.fit import Maker, Sample
from sparsetrain.evaluation.generative.words import Pairs
from sparsetrain.evaluation.ruler.specs import Kind, Needles

TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]
"""Where needles are put between the sentences of an essay, in percent."""

SHORT = 4096
"""Below so many tokens prompts shrink by smaller steps."""


class NeedleMaker(Maker):
    """Makes the prompts of one needle-in-a-haystack task.

    Args:
        length: tokens of the prompts.
        pairs: keys that are words.
        essay: the words of the essay.
        most: questions about one text, each for another key.
    """

    def __init__(self, needles: Needles, length: int, pairs: Pairs, essay: tuple[str, ...], most: int = 1) -> None:
        self.needles, self._pairs, self._essay, self._most = needles, pairs, essay, most
        if needles.haystack == "essay":
            self.step = 500
        else:
            self.step = 25 if length >= SHORT else 5
            self.fewest = needles.keys * needles.values

    def trial(self, units: int, draws: Draws) -> Sample:
        """A prompt of so many words of an essay, or lines of another haystack."""
        return self._asked(units, draws, 1)

    def sample(self, index: int, units: int, draws: Draws) -> Sample:
        """The same with other questions."""
        return self._asked(units, draws, self._most)

    def _asked(self, units: int, draws: Draws, most: int) -> Sample:
        task, random = self.needles, draws.random
        kind = f"{task.value}s"
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(task.keys):
            keys.append(self._key(draws, keys))
            values.append([self._draw(task.value, draws) for _ in range(task.values)])
        hidden = [
            NEEDLE.format(kind=kind, key=key, value=value)
            for key, own in zip(keys, values, strict=True)
            for value in own
        ]
        found: dict[str, str] = {}
        context = self._hide(draws.shuffled(hidden), units, keys, found, draws)
        asked = random.sample(range(task.keys), task.queries)
        names = [keys[index] for index in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        template, prefix = TEMPLATE, PREFIX
        single = task.queries * task.values == 1
        if single:
            template, prefix = _singular(template), _singular(prefix)
            kind = kind[:-1]

        def sample(query: str, answers: list[str], others: Sequence[Sample] = ()) -> Sample:
            said = template.format(kind=kind, context=context, query=query)
            return Sample(said, prefix.format(kind=kind, query=query), answers, others=others)

        if single:
            found |= {key: own[0] for key, own in zip(keys, values, strict=True) if key not in names}
        # A key that is there twice has two answers.
        able = sorted(key for key, value in found.items() if value) if single else []
        others = [sample(key, [found[key]]) for key in draws.more.sample(able, min(most - 1, len(able)))]
        return sample(query, [value for index in asked for value in values[index]], others)

    def _hide(self, hidden: list[str], units: int, keys: list[str], found: dict[str, str], draws: Draws) -> str:
        task, random = self.needles, draws.random
        if task.haystack == "essay":
            lines = _first_sentences(self._essay, units)
            depths = random.sample(DEPTHS, len(hidden))
            cuts = [0, *sorted(int(len(lines) * (depth / 100)) for depth in depths), len(lines)]
            parts: list[str] = []
            for start, stop, needle in zip(cuts, cuts[1:], [*hidden, None]):
                parts += [" ".join(lines[start:stop])] + ([needle] if needle is not None else [])
            return " ".join(parts)
        if task.haystack == "noise":
            lines = [NOISE] * units
        else:
            lines = []
            for _ in range(units):
                key, value = self._key(draws, keys), self._draw(task.value, draws)
                lines.append(NEEDLE.format(kind=f"{task.value}s", key=key, value=value))
                found[key] = "" if key in found else value
        places = sorted(random.sample(range(units), len(hidden)), reverse=True)
        for place, needle in zip(places, hidden, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _key(self, draws: Draws, taken: list[str]) -> str:
        """A key; one that a needle has would make two answers right, which NVIDIA's scripts leave to chance."""
        while (key := self._draw(self.needles.key, draws)) in taken and not draws.mirror:
            pass
        return key

    def _draw(self, kind: Kind, draws: Draws) -> str:
        random = draws.random
        if kind == "number":
            return str(random.randint(10**6, 10**7 - 1))
        if kind == "word":
            return random.choice(self._pairs)
        return str(UUID(int=random.getrandbits(128), version=4))


def _singular(template: str) -> str:
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")


@lru_cache(maxsize=2)
def _first_sentences(essay: tuple[str, ...], words: int) -> list[str]:
    """The sentences of an essay's first words; it begins again where it ends."""
    repeats = -(-words // len(essay))
    return list(sentences((essay * repeats)[:words]))
