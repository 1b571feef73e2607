"""Conversations: a text with the numbers of many keys, and questions for some of them in random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.evaluation.generative.essay import among, sentences
from sparsetrain.evaluation.generative.fit import Maker, Room, Sample
from sparsetrain.evaluation.generative.prompts import PromptMaker
from sparsetrain.evaluation.generative.words import Pairs, Words
from sparsetrain.evaluation.multi_turn.settings import MultiTurnSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.evaluation.generative.draws import Draws

TEXT = (
    "The text below tells the numbers of some keys, among other things. Read all of it; questions follow, one after "
    "another.\n\n{context}\n\n{question}"
)
FACT = "The number of {key} is {number}."
QUESTION = "Question: What is the number of {key}? Answer with the number."
PREFIX = " Answer: The number of {key} is"
BUDGET = 32
"""Tokens of an answer at most."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    input_ids: np.ndarray
    """int32 ``[n]``: what is read behind all that was read and written before."""
    answer: str
    place: int
    """Tokens of the conversation before the sentence that tells the answer."""


@dataclass(frozen=True)
class Talk:
    """A conversation."""

    length: int
    """Tokens, as asked for."""
    turns: list[Turn]


@dataclass(frozen=True)
class Questions(Sample):
    """A text with its first question."""

    later: list[Sample]
    """The other questions."""


class TalkMaker(Maker):
    """Makes texts of so many sentences of filler between which the numbers of keys are told.

    Args:
        pairs: keys.
        filler: sentences, which begin again where they end. Each text begins at another one.
    """

    step = 25
    fewest = 0

    def __init__(self, settings: MultiTurnSettings, pairs: Pairs, filler: Sequence[str]) -> None:
        self._keys, self._turns, self._pairs, self._filler = settings.keys, settings.turns, pairs, filler

    def trial(self, units: int, draws: Draws) -> Sample:
        """A text, and questions."""
        random = draws.random
        keys = [self._pairs[place] for place in random.sample(range(len(self._pairs)), self._keys)]
        numbers = [str(number) for number in random.sample(range(10**6, 10**7), self._keys)]
        facts = [FACT.format(key=key, number=number) for key, number in zip(keys, numbers, strict=True)]
        context = among(self._filler, random.randrange(len(self._filler)), units, facts, random)
        asked = [
            Sample(QUESTION.format(key=keys[place]), PREFIX.format(key=keys[place]), [numbers[place]])
            for place in random.sample(range(self._keys), self._turns)
        ]
        first = asked[0]
        return Questions(TEXT.format(context=context, question=first.text), first.prefix, first.references, asked[1:])


class Talks(PromptMaker):
    """Makes the conversations that a section asks for.

    Raises:
        DataError: the file cannot be read, or the chat template not be used.
    """

    section: MultiTurnSettings

    def __init__(self, section: MultiTurnSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__(section, tokenizer, seed)
        with section.blaming("prompt"):
            self.encoder.next_ids(Sample("", "", []))

    def kinds(self) -> Sequence[str]:
        """One."""
        return ["multi_turn"]

    def budget(self, kind: str) -> int:
        """Tokens of all answers."""
        return BUDGET * self.section.turns

    def maker(self, kind: str, length: int, room: Room, draws: Draws) -> Maker:
        """What makes conversations."""
        return TalkMaker(self.section, self._words.pairs, self._filler)

    def count(self, sample: Sample) -> int:
        """Tokens of the text and all questions."""
        assert isinstance(sample, Questions)
        return super().count(sample) + sum(len(self.encoder.next_ids(each)) for each in sample.later)

    def prompts(self, kind: str, length: int, index: int, sample: Sample) -> list[Any]:
        """A conversation."""
        assert isinstance(sample, Questions)
        turns = []
        for turn in (sample, *sample.later):
            ids = self.encoder.ids(sample) if turn is sample else self.encoder.next_ids(turn)
            before = sample.text[: sample.text.index(f" is {turn.references[0]}.")]
            # Tokens up to the word before the number.
            place = self.encoder.tokens_before(before)
            turns.append(Turn(np.array(ids, dtype=np.int32), turn.references[0], place))
        return [Talk(length, turns)]

    @cached_property
    def _filler(self) -> tuple[str, ...]:
        return sentences(self.essay)

    @cached_property
    def _words(self) -> Words:
        return Words.made()
