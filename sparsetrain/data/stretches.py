"""Render long conversations in stretches of turns, in time that is linear in their length.

The text that a turn adds is found by rendering the conversation up to it. For thousands of turns this takes quadratic
time. A template usually renders a turn depending on neighbouring turns, the beginning of the conversation and its last
question, so a stretch is rendered with only these. The result is used only if all stretches together equal the text of
the whole conversation exactly, and a sample of turns is rendered as in the whole conversation.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from sparsetrain.data.conversation import Conversation
from sparsetrain.data.turns import added, words_of
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 96
"""Turns from which on a conversation is read in stretches."""
ANSWERS, MARGIN = 12, 3
"""Answers in a stretch, and on either side of it."""
SAMPLE = 6
"""Turns that are compared with what they are in the whole conversation."""


class Stretch(NamedTuple):
    """Some turns of a conversation, with the context that the template needs to render them as in the whole."""

    first: int
    """The first turn of this stretch."""
    conversation: Conversation
    text: str
    turns_before: int
    """Offset of turn indices: subtract it from an index in the whole conversation."""
    letters_before: int
    """Offset of characters: add it to a position in this text to get the position in the whole text."""

    def added(self, tokenizer: PreTrainedTokenizerBase, turn: int) -> tuple[int, int]:
        """:func:`added` for a turn index in the whole conversation, in characters of the whole text."""
        start, stop = added(self.conversation, tokenizer, turn - self.turns_before, self.text)
        return start + self.letters_before, stop + self.letters_before


def places_of(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turns: list[int], whole: str
) -> list[tuple[int, int]]:
    """The characters of ``whole`` that each of some turns adds (:func:`added`)."""
    if len(conversation.messages) < LONG:
        return [added(conversation, tokenizer, turn, whole) for turn in turns]
    places = _by_stretches(conversation, tokenizer, turns, whole)
    return places or [added(conversation, tokenizer, turn, whole) for turn in turns]


def _by_stretches(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turns: list[int], whole: str
) -> list[tuple[int, int]] | None:
    """The places, or None where stretches do not give them."""
    try:
        found = _stretches(conversation, tokenizer, whole)
        if found is None:
            return None
        begins = [stretch.first for stretch in found]
        places = [found[bisect_right(begins, turn) - 1].added(tokenizer, turn) for turn in turns]
        for number in {*range(0, len(turns), max(1, len(turns) // SAMPLE)), len(turns) - 1}:
            if places[number] != added(conversation, tokenizer, turns[number], whole):
                return None
    except MalformedRow:
        return None
    return places


def _stretches(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, whole: str) -> list[Stretch] | None:
    messages = conversation.messages
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        return None
    # What comes before a stretch: the system prompt and the first question. The last question comes behind it.
    head = roles.index("user") + 1
    last = len(roles) - 1 - roles[::-1].index("user")
    answers = [turn for turn in range(head, len(roles)) if roles[turn] == "assistant" != roles[turn - 1]]
    edges = list(range(ANSWERS, len(answers) - MARGIN, ANSWERS))
    found: list[Stretch] = []
    place = 0
    for begin, end in zip([0, *edges], [*edges, None]):
        opened = begin - MARGIN > 0
        start = answers[begin - MARGIN] if opened else 0
        closed = end is not None and end + MARGIN < len(answers)
        stop = answers[end + MARGIN] + 1 if closed and end is not None else len(messages)
        around = (messages[:head] if opened else []), (messages[last : last + 2] if stop <= last else [])
        part = replace(conversation, messages=[*around[0], *messages[start:stop], *around[1]], learned=[])
        turns_before = start - head if opened else 0
        text = part.written(tokenizer).text
        first = words_of(part, tokenizer, answers[begin] - turns_before, text).start if begin else 0
        rest = words_of(part, tokenizer, answers[end] - turns_before, text).start if end is not None else len(text)
        if not whole.startswith(text[first:rest], place):
            return None
        found.append(Stretch(answers[begin] if begin else 0, part, text, turns_before, place - first))
        place += rest - first
    return found if place == len(whole) else None
