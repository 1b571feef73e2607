"""All prompts of an evaluation: of each kind as many as asked for, as long as each length allows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.activity import activity
from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.chat import Encoder
from sparsetrain.evaluation.generative.draws import Draws, Seeding, draws_of_samples
from sparsetrain.evaluation.generative.essay import generated_essay, read_essay
from sparsetrain.evaluation.generative.fit import Maker, NoRoom, Room, Sample
from sparsetrain.evaluation.generative.task import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.evaluation.generative.settings import GenerativeSection


class PromptMaker(ABC):
    """Makes the prompts that a section asks for.

    Raises:
        DataError: a file cannot be read, or the chat template not be used.
    """

    def __init__(self, section: GenerativeSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.section, self.tokenizer, self.seed = section, tokenizer, seed
        with section.blaming("prompt"):
            self.encoder = Encoder(tokenizer, chat=section.uses_chat(tokenizer))

    @abstractmethod
    def kinds(self) -> Sequence[str]:
        """The kinds of prompts."""

    def leaving_out(self, kind: str) -> tuple[str, str] | None:
        """What a recipe leaves out so that a kind is not asked, and of which field; None if it cannot."""
        return None

    @abstractmethod
    def budget(self, kind: str) -> int:
        """Tokens written behind a prompt at most."""

    @abstractmethod
    def maker(self, kind: str, length: int, room: Room, draws: Draws) -> Maker:
        """What makes the prompts of a kind."""

    def seeding(self, kind: str, length: int) -> Seeding:
        """What is random in them: of each prompt on its own."""
        return draws_of_samples(self.seed, f"{self.section.task}/{kind}", length)

    def count(self, sample: Sample) -> int:
        """Tokens of a sample that belong to its length, without BOS, the chat template, and the budget; of the longest
        one where it has other questions."""
        return max(self.encoder.count(each) for each in (*sample.others, sample))

    def prompts(self, kind: str, length: int, index: int, sample: Sample) -> list[Any]:
        """What is asked of a model."""
        context = index if sample.others else None
        return [
            Prompt(kind, length, self.budget(kind), self.ids(each), each.references, context)
            for each in (sample, *sample.others)
        ]

    def ids(self, sample: Sample) -> np.ndarray:
        """The tokens that the model reads, int32 ``[n]``."""
        return np.array(self.encoder.ids(sample), dtype=np.int32)

    def all(self) -> list[Any]:
        """Every prompt, by kind and length.

        Raises:
            DataError: a length has no room for a kind, or a file has too few questions.
        """
        return [
            prompt
            for kind in self.kinds()
            for length in sorted(self.section.lengths)
            for prompt in self._of(kind, length)
        ]

    def smallest(self) -> None:
        """Try whether each kind fits the shortest length, without the search for how much does.

        Raises:
            DataError: some do not; all of them are named.
        """
        length = min(self.section.lengths)
        found = []
        for kind in self.kinds():
            maker, room, seeding = self._prepared(kind, length)
            try:
                maker.fitted(0, maker.fewest, room, seeding(0))
            except NoRoom as error:
                found.append((kind, error.tokens))
        if found:
            raise self._no_room(length, found)

    def _of(self, kind: str, length: int) -> Iterator[Any]:
        maker, room, seeding = self._prepared(kind, length)
        units = maker.units(room, seeding("search"))
        for index in range(self.section.samples):
            try:
                sample = maker.fitted(index, units, room, seeding(index))
            except NoRoom as error:
                raise self._no_room(length, [(kind, error.tokens)]) from error
            yield from self.prompts(kind, length, index, sample)
        activity.moved()

    def _prepared(self, kind: str, length: int) -> tuple[Maker, Room, Seeding]:
        seeding = self.seeding(kind, length)
        overhead = self.encoder.overhead
        room = Room(self.count, length - overhead, self.budget(kind), overhead)
        return self.maker(kind, length, room, seeding("shared")), room, seeding

    def _no_room(self, length: int, found: Sequence[tuple[str, int]]) -> DataError:
        """The error for kinds that a length has no room for, each with the tokens of its shortest prompt."""
        (first, tokens), *others = found
        also = "".join(f", {kind} {tokens:,}" for kind, tokens in others)
        fields: dict[str, list[str]] = {}
        for what, field in filter(None, (self.leaving_out(kind) for kind, _ in found)):
            fields.setdefault(field, []).append(what)
        without = ", ".join(f"{', '.join(what)} out of {self.section.path(field)}" for field, what in fields.items())
        return DataError(
            f"{self.section.path('lengths')}: a length of {length:,} has no room for {first}, whose shortest "
            f"prompt takes {tokens:,} tokens with its answer and this tokenizer{also}; ask for longer prompts"
            + (f", or leave {without}" if without else "")
        )

    @cached_property
    def essay(self) -> tuple[str, ...]:
        """The words of the filler."""
        file = self.section.place("haystack")
        return generated_essay() if file is None else read_essay(file, self.section.path("haystack"))
