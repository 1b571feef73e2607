"""Prompts of so many sentences of filler around a story, or of so many edges of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from sparsetrain.evaluation.generative.draws import Draws
from sparsetrain.evaluation.generative.essay import among
from sparsetrain.evaluation.generative.fit import Maker, Room, Sample
from sparsetrain.evaluation.generative.words import Words
from sparsetrain.evaluation.reasoning import graph
from sparsetrain.evaluation.reasoning.questions import ask
from sparsetrain.evaluation.reasoning.specs import FactKind, GraphKind

STORY = (
    "The text below tells, among other things, where some people went, and what they picked up, put down and gave to "
    "each other. Read all of it; a question follows.\n\n{context}\n\nQuestion: {question} Answer with one word."
)
GRAPH = (
    "Below are the edges of a directed graph, one in a line, in random order. Read all of them; a question follows.\n\n"
    "{context}\n\nQuestion: {question}"
)
PREFIX = " Answer: "


@dataclass(frozen=True)
class ReasoningSample(Sample):
    """A prompt with one answer."""

    options: Sequence[str]
    """All possible answers, or names that may be in one."""
    chance: float
    """Of a guess."""


class StoryMaker(Maker):
    """Hides a story in filler: its sentences stay in order, between those of the filler.

    Args:
        events: sentences of the story.
        filler: sentences, which begin again where they end. Each prompt begins at another one.
    """

    step = 25
    fewest = 0

    def __init__(self, kind: FactKind, events: int, filler: Sequence[str]) -> None:
        self._kind, self._events, self._filler = kind, events, filler

    def trial(self, units: int, draws: Draws) -> Sample:
        """A prompt of so many sentences of filler."""
        return self._drawn(draws)(units)

    def fitted(self, index: int, units: int, room: Room, draws: Draws) -> Sample:
        """The same story in as many sentences as fit."""
        return self.fit(self._drawn(draws), units, room, draws)

    def _drawn(self, draws: Draws) -> Callable[[int], Sample]:
        random, filler = draws.random, self._filler
        story, question = ask(self._kind, random, self._events)
        start = random.randrange(len(filler))
        seed = random.random()

        def sample(units: int) -> Sample:
            context = among(filler, start, units, story.sentences, Random(seed))
            return ReasoningSample(
                STORY.format(context=context, question=question.text),
                PREFIX + question.prefix,
                [question.answer],
                question.options,
                1 / len(question.options),
            )

        return sample


class GraphMaker(Maker):
    """Lists the edges of a graph, as many as there is room for.

    Args:
        hops: steps of a walk, or depth of a search.
    """

    step = 25

    def __init__(self, kind: GraphKind, hops: int, words: Words) -> None:
        self._kind, self._hops, self._words = kind, hops, words
        self.fewest = graph.fewest_edges(kind, hops)

    def trial(self, units: int, draws: Draws) -> Sample:
        """A prompt of so many edges."""
        edges = max(units, self.fewest)
        names = self._words.at_least(edges)
        drawn = graph.draw(self._kind, self._hops, edges, names, draws.random)
        question, prefix = _asked(self._kind, self._hops, drawn.start)
        context = "\n".join(f"{one} -> {other}" for one, other in drawn.edges)
        return ReasoningSample(
            GRAPH.format(context=context, question=question),
            PREFIX + prefix,
            drawn.answer,
            sorted({node for edge in drawn.edges for node in edge}),
            drawn.chance,
        )


def _asked(kind: GraphKind, hops: int, start: str) -> tuple[str, str]:
    """The question, and how its answer begins."""
    steps = "1 step" if hops == 1 else f"{hops} steps"
    if kind == "walk":
        return (
            f"Exactly one edge leaves each node. Where does one come who starts at {start} and follows the edges for "
            f"{steps}? Answer with the name of the node.",
            f"{steps} from {start} is the node",
        )
    if kind == "parents":
        return (
            f"Which nodes have an edge to {start}? Answer with their names, separated by commas.",
            f"The nodes with an edge to {start} are:",
        )
    return (
        f"Which nodes are exactly {steps} from {start}, by the shortest way along the edges? Answer with their names, "
        "separated by commas.",
        f"The nodes {steps} from {start} are:",
    )
