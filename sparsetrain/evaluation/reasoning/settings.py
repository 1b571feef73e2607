"""What a recipe says of reasoning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, get_args

from pydantic import Field

from sparsetrain.evaluation.generative.settings import GenerativeSection
from sparsetrain.evaluation.reasoning.specs import SUPPORTING, FactKind, Kind
from sparsetrain.section import Bounds

_STEPS = Bounds(64, "a walk of more steps is hardly asked for")
_DEPTH = Bounds(4, "an answer would have more than 16 names")
_FACTS = Bounds(1000, "a story is told in one text", least=8)


class ReasoningSettings(GenerativeSection):
    """The settings of the task ``reasoning``."""

    kinds: Annotated[list[Kind], Field(min_length=1)] | None = None
    """What is asked: ``one_fact``, ``two_facts``, ``three_facts``, ``giving``, ``yes_no`` and ``counting`` about
    stories, ``walk``, ``parents`` and ``bfs`` about graphs; null is all."""
    facts: Annotated[int, Field(gt=0), _FACTS] = 20
    """Sentences of a story. The rest of the text is filler."""
    walk_steps: Annotated[list[Annotated[int, Field(gt=0), _STEPS]], Field(min_length=1, max_length=64)] = [1, 2, 4, 8]
    """Edges of the walks that are asked for, each a kind of its own."""
    bfs_depths: Annotated[list[Annotated[int, Field(gt=0), _DEPTH]], Field(min_length=1, max_length=4)] = [1, 2, 3]
    """Depths of the searches that are asked for, each a kind of its own. Two edges leave each node."""

    @property
    def measured(self) -> list[tuple[Kind, int | None]]:
        """The kinds and their hops, in order."""
        several = {"walk": sorted({*self.walk_steps}), "bfs": sorted({*self.bfs_depths})}
        chosen = [kind for kind in get_args(Kind) if self.kinds is None or kind in self.kinds]
        return [(kind, hops) for kind in chosen for hops in several.get(kind, [SUPPORTING.get(kind)])]

    def faults(self) -> Iterator[tuple[str, str]]:
        """Settings of kinds that are not measured."""
        yield from super().faults()
        yield from self.repeated("kinds", "walk_steps", "bfs_depths")
        kinds = {kind for kind, _ in self.measured}
        for name, users in {
            "haystack": get_args(FactKind),
            "facts": get_args(FactKind),
            "walk_steps": ("walk",),
            "bfs_depths": ("bfs",),
        }.items():
            usual = type(self).model_fields[name].get_default()
            if getattr(self, name) != usual and not kinds & {*users}:
                yield name, f"has no effect here: none of {self.path('kinds')} needs it ({', '.join(users)})"
