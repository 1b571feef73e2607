"""The kinds of questions, the tokens of their answers, and what counts as an answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsetrain.evaluation.generative.task import Prompt

FactKind = Literal["one_fact", "two_facts", "three_facts", "giving", "yes_no", "counting"]
GraphKind = Literal["walk", "parents", "bfs"]
Kind = Literal["one_fact", "two_facts", "three_facts", "giving", "yes_no", "counting", "walk", "parents", "bfs"]

SUPPORTING: dict[str, int | None] = {
    "one_fact": 1,
    "two_facts": 2,
    "three_facts": 3,
    "giving": 1,
    "yes_no": 1,
    "counting": None,
    "parents": 1,
}
"""Facts that an answer follows from, of kinds that have a number of their own; counting takes as many as there are."""

NUMBERS = ("none", "one", "two", "three")
"""Answers of ``counting``, equally often each."""
_ALSO = {"zero": "none", "0": "none", "1": "one", "2": "two", "3": "three"}

PARENTS = 3
"""Answers of ``parents`` at most."""
OUT = 2
"""Edges that leave a node, except in walks, where it is one."""

_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_END = re.compile(r"[.\n]")


@dataclass(frozen=True)
class ReasoningPrompt(Prompt):
    """A question with one answer."""

    options: Sequence[str] = ()
    """All possible answers, or names that may be in one."""
    chance: float = 0.0
    """Of a guess."""


def key(kind: str, hops: int | None) -> str:
    """What prompts of a kind are counted under."""
    return f"{kind}/{hops}"


def budget(kind: str, hops: int | None) -> int:
    """Tokens written at most."""
    if kind == "bfs":
        return 16 + 8 * OUT ** (hops or 0)
    return 16 + 8 * PARENTS if kind == "parents" else 16


def is_set(kind: str) -> bool:
    """Whether an answer is a set of names."""
    return kind in ("parents", "bfs")


def is_right(kind: str, text: str, options: Collection[str], references: Sequence[str]) -> bool:
    """Whether a text gives the answer.

    Of one word: the first possible answer that the text names. Of a set: all that the text names before it breaks the
    line or ends a sentence, in any order.

    Args:
        options: all possible answers, or names that may be in a set.
        references: the answer, or the names of the set.
    """
    known = {option.lower() for option in options}
    said = _END.split(text.strip(), maxsplit=1)[0] if is_set(kind) else text
    words = [_ALSO.get(word, word) if kind == "counting" else word for word in _WORD.findall(said.lower())]
    named = [word for word in words if word in known]
    wanted = {reference.lower() for reference in references}
    return {*named} == wanted if is_set(kind) else {*named[:1]} == wanted
