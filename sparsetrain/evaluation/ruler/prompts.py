"""All prompts of an evaluation with RULER."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsetrain.activity import activity
from sparsetrain.errors import DataError
from sparsetrain.evaluation.ruler.chat import Encoder
from sparsetrain.evaluation.ruler.documents import QuestionMaker, Questions, read_hotpot, read_squad
from sparsetrain.evaluation.ruler.draws import Draws, Seeding, draws_of_samples, mirrored_draws
from sparsetrain.evaluation.ruler.essay import generated_essay, read_essay
from sparsetrain.evaluation.ruler.fit import Maker, NoRoom, Room
from sparsetrain.evaluation.ruler.frequency import CommonWordsMaker, FrequentWordsMaker
from sparsetrain.evaluation.ruler.niah import NeedleMaker
from sparsetrain.evaluation.ruler.specs import BUDGETS, NEEDLES
from sparsetrain.evaluation.ruler.tracking import TrackingMaker
from sparsetrain.evaluation.ruler.words import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.evaluation.ruler.settings import RulerSettings


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answers."""

    task: str
    length: int
    input_ids: np.ndarray
    """int32 ``[n]``: what the model goes on from."""
    references: list[str]


class Prompts:
    """Makes the prompts that a section asks for.

    Raises:
        DataError: a file cannot be read, or the chat template not be used.
    """

    def __init__(self, section: RulerSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._section, self._seed = section, seed
        with section.blaming("prompt"):
            self._encoder = Encoder(tokenizer, chat=section.uses_chat(tokenizer))

    def all(self) -> list[Prompt]:
        """Every prompt, by task and length.

        Raises:
            DataError: a length has no room for a task, or a file has too few questions.
        """
        made: list[Prompt] = []
        for task in self._section.measured:
            for length in sorted(set(self._section.lengths)):
                made += self._of(task, length)
                activity.moved()
        return made

    def smallest(self) -> None:
        """Try whether each task fits the shortest length, without the search for how much does.

        Raises:
            DataError: one does not.
        """
        length = min(self._section.lengths)
        for task in self._section.measured:
            maker, room, seeding = self._prepared(task, length)
            self._fitted(maker, 0, maker.fewest, room, seeding, task, length)

    def _of(self, task: str, length: int) -> list[Prompt]:
        maker, room, seeding = self._prepared(task, length)
        units = maker.units(room, seeding("search"))
        return [self._fitted(maker, i, units, room, seeding, task, length) for i in range(self._section.samples)]

    def _prepared(self, task: str, length: int) -> tuple[Maker, Room, Seeding]:
        seeding = mirrored_draws() if self._section.mirror else draws_of_samples(self._seed, task, length)
        overhead = self._encoder.overhead
        room = Room(self._encoder.count, length - overhead, BUDGETS[task], overhead)
        return self._maker(task, length, room, seeding("shared")), room, seeding

    def _fitted(
        self, maker: Maker, index: int, units: int, room: Room, seeding: Seeding, task: str, length: int
    ) -> Prompt:
        try:
            sample = maker.fitted(index, units, room, seeding(index))
        except NoRoom as error:
            raise DataError(
                f"{self._section.path('lengths')}: a length of {length:,} has no room for {task}, whose shortest "
                f"prompt takes {error.tokens:,} tokens with its answer and this tokenizer; ask for longer prompts, or "
                f"leave {task} out of {self._section.path('tasks')}"
            ) from error
        ids = np.array(self._encoder.ids(sample), dtype=np.int32)
        return Prompt(task, length, ids, sample.references)

    def _maker(self, task: str, length: int, room: Room, draws: Draws) -> Maker:
        if task in NEEDLES:
            essay = self._essay if NEEDLES[task].haystack == "essay" else ()
            return NeedleMaker(NEEDLES[task], length, self._words.pairs, essay)
        if task == "vt":
            return TrackingMaker(length, room, draws)
        if task == "cwe":
            return CommonWordsMaker(length, self._words)
        if task == "fwe":
            return FrequentWordsMaker(room)
        order = None if self._section.mirror else draws_of_samples(self._seed, task, 0)("order")
        return QuestionMaker(self._squad if task == "qa_1" else self._hotpot, order)

    @cached_property
    def _words(self) -> Words:
        folder = self._section.place("words")
        return Words.made() if folder is None else Words.read(folder, self._section.path("words"))

    @cached_property
    def _essay(self) -> tuple[str, ...]:
        file = self._section.place("haystack")
        return generated_essay() if file is None else read_essay(file, self._section.path("haystack"))

    @cached_property
    def _squad(self) -> Questions:
        return self._questions("squad", read_squad)

    @cached_property
    def _hotpot(self) -> Questions:
        return self._questions("hotpot", read_hotpot)

    def _questions(self, name: str, read: Callable[[Path, str], Questions]) -> Questions:
        file = self._section.place(name)
        assert file is not None, f"a task is measured only where {name} is given"
        found = read(file, self._section.path(name))
        if len(found.questions) < self._section.samples:
            raise DataError(
                f"{self._section.path('samples')}: {self._section.samples:,} are more than the "
                f"{len(found.questions):,} questions of {self._section.path(name)}; ask for fewer"
            )
        return found
