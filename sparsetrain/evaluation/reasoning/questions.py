"""Questions about a story."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from sparsetrain.evaluation.reasoning.specs import NUMBERS, FactKind
from sparsetrain.evaluation.reasoning.story import PEOPLE, PLACES, Story


@dataclass(frozen=True)
class Question:
    """A question with one answer."""

    text: str
    prefix: str
    """How the answer begins."""
    answer: str
    options: tuple[str, ...]
    """All possible answers. Guessing one of them is the level of chance."""


def ask(kind: FactKind, random: Random, events: int) -> tuple[Story, Question]:
    """A story about which there is something of this kind to ask, and a question.

    Where the answer is yes or no, or a number, it is drawn first, so that all answers come equally often.
    """
    wanted = random.choice({"yes_no": ("yes", "no"), "counting": NUMBERS}.get(kind, ("",)))
    while True:
        story = Story(random, events)
        questions = _KINDS[kind](story, wanted)
        if questions:
            return story, random.choice(questions)


def _one_fact(story: Story, wanted: str) -> list[Question]:
    return [
        Question(f"Where is {who}?", f"{who} is in the", places[-1], PLACES)
        for who, places in story.visited.items()
        if places
    ]


def _two_facts(story: Story, wanted: str) -> list[Question]:
    return [
        Question(f"Where is the {thing}?", f"The {thing} is in the", places[-1], PLACES)
        for thing, places in story.path.items()
        if places
    ]


def _three_facts(story: Story, wanted: str) -> list[Question]:
    return [
        Question(
            f"Where was the {thing} before it was in the {place}?",
            f"Before the {place}, the {thing} was in the",
            before,
            tuple(each for each in PLACES if each != place),
        )
        for thing, places in story.path.items()
        for before, place in pairwise(places)
        if places.count(place) == 1
    ]


def _giving(story: Story, wanted: str) -> list[Question]:
    gifts = [event for event in story.events if event.verb == "give"]
    times = Counter((event.thing, event.other) for event in gifts)
    return [
        Question(
            f"Who gave the {event.thing} to {event.other}?",
            f"{event.other} got the {event.thing} from",
            event.person,
            tuple(each for each in PEOPLE if each != event.other),
        )
        for event in gifts
        if times[event.thing, event.other] == 1
    ]


def _yes_no(story: Story, wanted: str) -> list[Question]:
    """Where the answer is no, the person was there before."""
    found = []
    for who, places in story.visited.items():
        asked = places[-1:] if wanted == "yes" else sorted({*places} - {*places[-1:]})
        found += [
            Question(f"Is {who} in the {place}, yes or no?", "The right word is", wanted, ("yes", "no"))
            for place in asked
        ]
    return found


def _counting(story: Story, wanted: str) -> list[Question]:
    """Of people who have had something."""
    had = sorted({event.other if event.verb == "give" else event.person for event in story.events if event.thing})
    return [
        Question(
            f"How many objects does {who} carry: none, one, two or three?",
            f"The number of objects that {who} carries is",
            wanted,
            NUMBERS,
        )
        for who in had
        if len(story.held_by(who)) == NUMBERS.index(wanted)
    ]


_KINDS: dict[str, Callable[[Story, str], list[Question]]] = {
    "one_fact": _one_fact,
    "two_facts": _two_facts,
    "three_facts": _three_facts,
    "giving": _giving,
    "yes_no": _yes_no,
    "counting": _counting,
}
