"""Variable tracking: which variables have a value, through a chain of assignments (RULER's ``vt``)."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from sparsetrain.data.synthetic import NOISE
from sparsetrain.evaluation.generative.draws import Draws
from sparsetrain.evaluation.generative.fit import Maker, NoRoom, Room, Sample
from sparsetrain.evaluation.ruler.niah import SHORT

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
VARIABLE = "VAR"
HOPS = 4
EXAMPLE_TOKENS = 500
"""Tokens of the solved example, where its shortest form has no more."""
EXAMPLE_VALUE = "12345"


class TrackingMaker(Maker):
    """Makes the prompts: lines of noise, a chain of ``HOPS`` assignments in its order, and a solved example before.

    Args:
        draws: draw the example.
    """

    fewest = HOPS + 1

    def __init__(self, length: int, room: Room, draws: Draws) -> None:
        self.step = 10 if length >= SHORT else 5
        example, small = _ExampleMaker(), replace(room, most=EXAMPLE_TOKENS - room.overhead, budget=0)
        units = example.units(small, draws)
        try:
            solved = example.fitted(0, units, small, draws)
        except NoRoom:
            solved = example.trial(example.fewest, draws)
        self._names = solved.references
        self._example = f"{solved.text}{solved.prefix} {' '.join(self._names)}\n"
        self.beside = room.count(Sample(self._example, "", []))

    def trial(self, units: int, draws: Draws) -> Sample:
        """A prompt of so many lines of noise, without the example."""
        return _chain(units, draws, letters=5, value=draws.five_digits)

    def sample(self, index: int, units: int, draws: Draws) -> Sample:
        """A prompt behind the example with names and a value of its own."""
        asked = self.trial(units, draws)
        example = self._example
        for name in self._names:
            example = example.replace(name, _name(draws, len(name), apart=example))
        example = example.replace(EXAMPLE_VALUE, draws.five_digits())
        return replace(asked, text=f"{example}\n{asked.text}")


class _ExampleMaker(Maker):
    """Makes the example: names of three letters, and a value that every sample replaces."""

    step = 5
    fewest = HOPS + 1

    def trial(self, units: int, draws: Draws) -> Sample:
        return _chain(units, draws, letters=3, value=lambda: EXAMPLE_VALUE)


def _chain(units: int, draws: Draws, letters: int, value: Callable[[], str]) -> Sample:
    names = [_name(draws, letters) for _ in range(HOPS + 1)]
    while len(distinct := list(dict.fromkeys(names))) <= HOPS:
        names.append(_name(draws, letters))
    given = value()
    chain = [f"{VARIABLE} {distinct[0]} = {given}"]
    chain += [f"{VARIABLE} {name} = {VARIABLE} {before} " for before, name in pairwise(distinct)]
    lines = [NOISE] * units
    places = sorted(draws.random.sample(range(units), len(chain)))
    for index, (place, statement) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + index, statement)
    return Sample(
        TEMPLATE.format(context="\n".join(lines), value=given),
        PREFIX.format(count=len(distinct), value=given),
        distinct,
    )


def _name(draws: Draws, letters: int, apart: str = VARIABLE) -> str:
    """A name that a text does not contain yet, which NVIDIA's scripts leave to chance."""
    while (name := "".join(draws.random.choices(string.ascii_uppercase, k=letters))) in apart and not draws.mirror:
        pass
    return name
