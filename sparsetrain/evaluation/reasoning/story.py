"""A small world whose people move, and pick up, put down and give away things (the kind of bAbI, 1502.05698)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

PEOPLE = ("Alma", "Bruno", "Carla", "Dario", "Edith", "Felix", "Greta", "Hugo")
PLACES = ("kitchen", "cellar", "attic", "bathroom", "workshop", "stable", "pantry", "hallway")
OBJECTS = ("lantern", "ladder", "basket", "violin", "compass", "hammer", "blanket", "mirror")

Verb = Literal["move", "take", "drop", "give"]

SENTENCES: dict[Verb, tuple[str, ...]] = {
    "move": ("{person} went to the {other}.", "{person} walked into the {other}.", "{person} moved to the {other}."),
    "take": ("{person} picked up the {thing}.", "{person} took the {thing} along.", "{person} grabbed the {thing}."),
    "drop": ("{person} put down the {thing}.", "{person} left the {thing} behind.", "{person} dropped the {thing}."),
    "give": ("{person} gave the {thing} to {other}.", "{person} handed the {thing} over to {other}."),
}
WEIGHTS: dict[Verb, int] = {"move": 5, "take": 4, "drop": 1, "give": 2}
"""How often each comes, where it is possible."""


@dataclass(frozen=True)
class Event:
    """Something that happens."""

    verb: Verb
    person: str
    thing: str = ""
    """What is taken, dropped or given."""
    other: str = ""
    """Where someone moves to, or who is given something."""


class Story:
    """So many events, each possible after those before, and what is the case behind them.

    Nobody and nothing is anywhere until it is said: people are where they last moved, and a thing that nobody has held
    may be where it is first picked up.
    """

    def __init__(self, random: Random, events: int) -> None:
        self.visited: dict[str, list[str]] = defaultdict(list)
        """The places that each person moved to, in order."""
        self.path: dict[str, list[str]] = defaultdict(list)
        """The places that each thing is known to have been at, in order; no place twice in a row."""
        self.holder: dict[str, str] = {}
        """Who has each thing that somebody has."""
        self.events: list[Event] = []
        self.sentences: list[str] = []
        for _ in range(events):
            possible = {verb: found for verb, choices in self._CHOICES.items() if (found := choices(self))}
            verb = random.choices([*possible], [WEIGHTS[each] for each in possible])[0]
            event = random.choice(possible[verb])
            self._happen(event)
            self.sentences.append(random.choice(SENTENCES[verb]).format(**vars(event)))

    def held_by(self, person: str) -> list[str]:
        """What someone has."""
        return [thing for thing, holder in self.holder.items() if holder == person]

    def _place(self, person: str) -> str | None:
        return self.visited[person][-1] if self.visited[person] else None

    def _moves(self) -> list[Event]:
        return [Event("move", who, other=place) for who in PEOPLE for place in PLACES if place != self._place(who)]

    def _takes(self) -> list[Event]:
        free = [thing for thing in OBJECTS if thing not in self.holder]
        return [
            Event("take", who, thing)
            for who in PEOPLE
            for thing in free
            if (here := self._place(who)) is not None and (not self.path[thing] or self.path[thing][-1] == here)
        ]

    def _drops(self) -> list[Event]:
        return [Event("drop", who, thing) for thing, who in self.holder.items()]

    def _gifts(self) -> list[Event]:
        return [
            Event("give", who, thing, other)
            for thing, who in self.holder.items()
            for other in PEOPLE
            if other != who and self._place(other) == self._place(who)
        ]

    _CHOICES: dict[Verb, Callable[[Story], list[Event]]] = {
        "move": _moves,
        "take": _takes,
        "drop": _drops,
        "give": _gifts,
    }

    def _happen(self, event: Event) -> None:
        if event.verb == "move":
            self.visited[event.person].append(event.other)
            moved = self.held_by(event.person)
        else:
            moved = [event.thing]
        if event.verb in ("take", "give"):
            self.holder[event.thing] = event.other or event.person
        elif event.verb == "drop":
            del self.holder[event.thing]
        here = self.visited[event.person][-1]
        for thing in moved:
            if self.path[thing][-1:] != [here]:
                self.path[thing].append(here)
        self.events.append(event)
