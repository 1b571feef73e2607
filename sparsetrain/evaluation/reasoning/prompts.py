"""The prompts of reasoning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, get_args

from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.essay import sentences
from sparsetrain.evaluation.generative.prompts import PromptMaker
from sparsetrain.evaluation.generative.words import Words
from sparsetrain.evaluation.reasoning.makers import GraphMaker, ReasoningSample, StoryMaker
from sparsetrain.evaluation.reasoning.settings import ReasoningSettings
from sparsetrain.evaluation.reasoning.specs import FactKind, ReasoningPrompt, budget, key
from sparsetrain.evaluation.reasoning.story import PEOPLE

if TYPE_CHECKING:
    from sparsetrain.evaluation.generative.draws import Draws
    from sparsetrain.evaluation.generative.fit import Maker, Room, Sample
    from sparsetrain.evaluation.generative.task import Prompt


_NAMED = re.compile(rf"\b({'|'.join(PEOPLE)})\b")


class ReasoningPrompts(PromptMaker):
    """Makes the prompts that a section asks for.

    Raises:
        DataError: the file cannot be read, or the chat template not be used.
    """

    section: ReasoningSettings

    def kinds(self) -> Sequence[str]:
        """Kinds with their hops."""
        return [key(*each) for each in self.section.measured]

    def leaving_out(self, kind: str) -> tuple[str, str]:
        """The number of hops, where there are others of its kind, or the kind."""
        name, hops = _parts(kind)
        depths = {"walk": "walk_steps", "bfs": "bfs_depths"}
        if name in depths and len(getattr(self.section, depths[name])) > 1:
            return str(hops), depths[name]
        return name, "kinds"

    def budget(self, kind: str) -> int:
        """Tokens written behind a prompt at most."""
        return budget(*_parts(kind))

    def maker(self, kind: str, length: int, room: Room, draws: Draws) -> Maker:
        """What makes the prompts of a kind."""
        name, hops = _parts(kind)
        if name in get_args(FactKind):
            return StoryMaker(cast(FactKind, name), self.section.facts, self._filler)
        return GraphMaker(cast(Any, name), hops or 1, self._words)

    def prompts(self, kind: str, length: int, index: int, sample: Sample) -> list[Prompt]:
        """What is asked of a model."""
        assert isinstance(sample, ReasoningSample)
        return [
            ReasoningPrompt(
                kind,
                length,
                self.budget(kind),
                self.ids(sample),
                sample.references,
                options=sample.options,
                chance=sample.chance,
            )
        ]

    @cached_property
    def _filler(self) -> tuple[str, ...]:
        """Sentences without those that name people of stories, about whom they might say something else."""
        found = tuple(line for line in sentences(self.essay) if not _NAMED.search(line))
        if not found:
            raise DataError(
                f"{self.section.path('haystack')}: all of its sentences name {', '.join(PEOPLE[:-1])} or {PEOPLE[-1]}, "
                "of whom stories tell; give another text"
            )
        return found

    @cached_property
    def _words(self) -> Words:
        return Words.made()


def _parts(kind: str) -> tuple[str, int | None]:
    name, _, hops = kind.partition("/")
    return name, int(hops) if hops.isdecimal() else None
