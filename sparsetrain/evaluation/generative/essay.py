"""The essay that needles are hidden in: a user's text, or sentences of a small grammar, which no one else wrote.

RULER takes Paul Graham's essays, which are his. A text of a grammar hardly repeats a sentence, but is more uniform
than an author's: figures compare where the text is the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

from sparsetrain.counted import counted
from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.draws import MIRRORED
from sparsetrain.textfile import text_lines

WORDS = 2**17
"""Words of the generated text. Longer prompts repeat it, as RULER repeats its essays."""

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

_OPENINGS = (
    "",
    "In most years ",
    "As a rule ",
    "Before the war ",
    "After the harvest ",
    "On quiet evenings ",
    "To everyone's surprise ",
    "According to the letters ",
    "By the end of the week ",
    "Long before the railway came ",
    "When the river was low ",
    "If the records are right ",
)
_PEOPLE = (
    *("the baker", "the old surveyor", "a teacher from the coast", "the second clerk", "her neighbour"),
    *("the ferryman", "a retired judge", "the young printer", "the gardener", "his eldest sister"),
    *("the village council", "a travelling painter", "the night watchman", "the librarian", "a family of weavers"),
    *("the beekeeper", "the harbour master", "a student of botany", "the clockmaker", "the mayor's nephew"),
)
_DOINGS = (
    *("repaired", "sold", "described", "borrowed", "painted", "inherited", "measured", "moved", "forgot", "rebuilt"),
    *("counted", "exchanged", "admired", "locked away", "photographed", "lent out", "cleaned", "gave up", "found"),
)
_THINGS = (
    *("the stone bridge", "an upright piano", "three barrels of cider", "the tower clock", "a map of the valley"),
    *("the greenhouse", "a wooden boat", "the church bells", "two copper kettles", "the orchard wall"),
    *("a collection of shells", "the schoolhouse roof", "an iron gate", "the weather station", "a box of letters"),
    *("the mill wheel", "a telescope", "the town archive", "a pair of oxen", "the herb garden", "an account book"),
)
_PLACES = (
    *("behind the station", "near the northern shore", "on the upper floor", "in the narrow lane", "at the crossroads"),
    *("beside the quarry", "across the square", "under the linden trees", "along the canal", "above the bakery"),
    *("outside the old walls", "by the lighthouse", "between the two farms", "at the edge of the forest"),
)
_REASONS = (
    *("because the price had risen", "although nobody had asked", "so that the children could see it"),
    *("and said little about it", "while the others were at dinner", "since the winter had been mild"),
    *("but kept a careful record", "as the custom required", "until the first snow fell", "without much hope"),
    *("and wrote about it years later", "for reasons that are still unclear", "with the help of two strangers"),
)
_ENDINGS = (".", ".", ".", ".", ".", "!", "?")


@lru_cache(maxsize=1)
def generated_essay() -> tuple[str, ...]:
    """The words of a text of our own, always the same."""
    choice = Random(MIRRORED).choice
    words: list[str] = []
    while len(words) < WORDS:
        sentence = (
            f"{choice(_OPENINGS)}{choice(_PEOPLE)} {choice(_DOINGS)} {choice(_THINGS)} {choice(_PLACES)} "
            f"{choice(_REASONS)}{choice(_ENDINGS)}"
        )
        words += (sentence[0].upper() + sentence[1:]).split()
    return tuple(words)


def sentences(words: tuple[str, ...]) -> tuple[str, ...]:
    """The sentences of a text, which end at ``.``, ``!`` or ``?`` before a space."""
    return tuple(SENTENCE_END.split(" ".join(words).strip()))


def among(filler: Sequence[str], start: int, count: int, told: Sequence[str], random: Random) -> str:
    """A text of ``count`` sentences of the filler, which begins again where it ends, and between them, in their order
    and at random depths, the sentences that are told.

    Args:
        start: the first sentence of the filler.
    """
    around = [filler[(start + place) % len(filler)] for place in range(count)]
    parts: list[str] = []
    begin = 0
    for depth, sentence in zip(sorted(random.random() for _ in told), told, strict=True):
        stop = int(depth * (count + 1))
        parts += [*around[begin:stop], sentence]
        begin = stop
    return " ".join(parts + around[begin:])


LONGEST = 100
"""Words of a sentence, on average, above which needles could not be put where they should."""


def read_essay(path: Path, called: str) -> tuple[str, ...]:
    """The words of a user's text.

    Raises:
        DataError: it cannot be read, or has no words or hardly a sentence.
    """
    words = tuple("".join(text_lines(path, f"{called}: {path}", DataError)).split())
    if not words:
        raise DataError(f"{called}: {path} has no words; give a text to hide needles in")
    ends = sum(word.endswith((".", "!", "?")) for word in words)
    if len(words) > LONGEST * ends:
        raise DataError(
            f"{called}: {path} has {counted(len(words), 'word')} and {counted(ends, 'sentence')}; needles stand "
            "between sentences, so give a text whose sentences end at . ! or ? before a space"
        )
    return words
