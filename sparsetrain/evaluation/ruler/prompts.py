"""The prompts of an evaluation with RULER."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.draws import Draws, Seeding, draws_of_samples, mirrored_draws
from sparsetrain.evaluation.generative.fit import Maker, Room
from sparsetrain.evaluation.generative.prompts import PromptMaker
from sparsetrain.evaluation.generative.words import Words
from sparsetrain.evaluation.ruler.documents import QuestionMaker, Questions, read_hotpot, read_squad
from sparsetrain.evaluation.ruler.frequency import CommonWordsMaker, FrequentWordsMaker
from sparsetrain.evaluation.ruler.niah import NeedleMaker
from sparsetrain.evaluation.ruler.question_rows import hotpot_rows, squad_rows
from sparsetrain.evaluation.ruler.settings import QuestionSource, RulerSettings
from sparsetrain.evaluation.ruler.specs import BUDGETS, NEEDLES
from sparsetrain.evaluation.ruler.tracking import TrackingMaker


class Prompts(PromptMaker):
    """Makes the prompts that a section asks for.

    Raises:
        DataError: a file cannot be read, or the chat template not be used.
    """

    section: RulerSettings

    def kinds(self) -> Sequence[str]:
        """The tasks."""
        return self.section.measured

    def leaving_out(self, kind: str) -> tuple[str, str]:
        """The task."""
        return kind, "tasks"

    def budget(self, kind: str) -> int:
        """Tokens written behind a prompt at most."""
        return BUDGETS[kind]

    def seeding(self, kind: str, length: int) -> Seeding:
        """What is random in the prompts of a task."""
        return mirrored_draws() if self.section.mirror else draws_of_samples(self.seed, kind, length)

    def maker(self, kind: str, length: int, room: Room, draws: Draws) -> Maker:
        """What makes the prompts of a task."""
        if kind in NEEDLES:
            essay = self.essay if NEEDLES[kind].haystack == "essay" else ()
            return NeedleMaker(NEEDLES[kind], length, self._words.pairs, essay, self.section.questions)
        if kind == "vt":
            return TrackingMaker(length, room, draws)
        if kind == "cwe":
            return CommonWordsMaker(length, self._words)
        if kind == "fwe":
            return FrequentWordsMaker(room)
        order = None if self.section.mirror else draws_of_samples(self.seed, kind, 0)("order")
        return QuestionMaker(self._squad if kind == "qa_1" else self._hotpot, order, self.section.questions)

    @cached_property
    def _words(self) -> Words:
        folder = self.section.place("words")
        return Words.made() if folder is None else Words.read(folder, self.section.path("words"))

    @cached_property
    def _squad(self) -> Questions:
        return self._questions("squad", read_squad, squad_rows)

    @cached_property
    def _hotpot(self) -> Questions:
        return self._questions("hotpot", read_hotpot, hotpot_rows)

    def _questions(
        self,
        name: str,
        read: Callable[[Path, str], Questions],
        read_rows: Callable[[QuestionSource, str], Questions],
    ) -> Questions:
        given, called = getattr(self.section, name), self.section.path(name)
        if isinstance(given, QuestionSource):
            found = read_rows(given, called)
        else:
            file = self.section.place(name)
            assert file is not None, f"a task is measured only where {name} is given"
            found = read(file, called)
        if len(found.questions) < self.section.samples:
            raise DataError(
                f"{self.section.path('samples')}: {self.section.samples:,} are more than the "
                f"{len(found.questions):,} questions of {called}; ask for fewer"
            )
        return found
