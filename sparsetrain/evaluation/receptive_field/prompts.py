"""Texts that tell a digit in one place, and end just before it would be repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparsetrain.data.encoding import encode, encode_after, opening
from sparsetrain.data.synthetic import WORDINGS
from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.essay import generated_essay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 10
FEWEST, MORE = 4096, 8
"""Words of the text that prompts are cut from: so many at least, and so many for each token of a prompt."""


class Prompt(NamedTuple):
    """A prompt and where its key is."""

    tokens: np.ndarray
    """int64 ``[length]``."""
    digit: int
    places: list[int]
    """Positions of the tokens that tell the digit."""


class Prompts:
    """Makes passkey prompts of exactly ``length`` tokens with a key of one digit, in a text that is never the same.

    Raises:
        DataError: there is no room for the task, or digits are not told apart by single tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._length = length
        wording = WORDINGS["passkey"]
        self._begin = [*opening(tokenizer), *encode(tokenizer, f"{wording.introduction}\n")]
        needles = [encode_after(tokenizer, "\n", f"\n{wording.needle.format(key=key)}\n") for key in range(DIGITS)]
        asked = [encode_after(tokenizer, "\n", f"\n{wording.question} {key}") for key in range(DIGITS)]
        if len({len(needle) for needle in needles}) > 1 or len({tuple(each[:-1]) for each in asked}) > 1:
            raise DataError("this tokenizer has no token for each digit, so a key of one digit takes several")
        self._needles, self._question = needles, asked[0][:-1]
        self._told = [place for place, tokens in enumerate(zip(*needles, strict=True)) if len(set(tokens)) > 1]
        self._room = length - len(self._begin) - len(needles[0]) - len(self._question)
        if self._room < 0:
            raise DataError(
                f"a prompt of {length} tokens has no room: with this tokenizer the task alone takes "
                f"{length - self._room} tokens; give longer ones"
            )

        words = generated_essay()[: max(FEWEST, MORE * length)]
        self._filler = np.array(encode_after(tokenizer, "\n", " ".join(words)), dtype=np.int64)

    def make(self, digit: int, depth: float, rng: np.random.Generator) -> Prompt:
        """A prompt with its key at a depth from 0 (the beginning) to 1."""
        start = int(rng.integers(len(self._filler)))
        filler = self._filler.take(range(start, start + self._room), mode="wrap")
        place = min(int(depth * self._length), self._length - 1) - len(self._begin)
        place = min(max(place, 0), self._room)
        parts: list[Any] = [self._begin, filler[:place], self._needles[digit], filler[place:], self._question]
        first = len(self._begin) + place
        return Prompt(np.concatenate(parts).astype(np.int64), digit, [first + told for told in self._told])
