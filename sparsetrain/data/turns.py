"""Find the position of a turn in the rendered text of its conversation."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsetrain.data.conversation import Conversation
from sparsetrain.data.encoding import shared_prefix
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER = "\u2042"
"""Stands for words that a turn could have had instead of its own."""


class Written(NamedTuple):
    """A conversation's text, and the half-open characters of it that change with the words of one turn."""

    text: str
    start: int
    stop: int


def added(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turn: int, whole: str) -> tuple[int, int]:
    """The characters of ``whole`` that a turn adds; of an assistant's, those behind what it is prompted with.

    Where all stays as it is once the conversation goes on, that is what the text gains by the turn. Many templates
    write the last turn, or what prompts it, in a way of its own: thoughts, another end token. There the turn is found
    by what changes in ``whole`` with its words, and reaches as far around these as it does alone.

    Raises:
        MalformedRow: the words, or where the turn begins, cannot be found.
    """
    after = conversation.written(tokenizer, turn + 1).text
    asked = conversation.messages[turn]["role"] == "assistant"
    before = conversation.written(tokenizer, turn, prompt=asked).text if turn else ""
    # What a template writes before a first turn is no part of it.
    if whole.startswith(after) and whole.startswith(before) and (turn or not asked):
        return len(before), len(after)
    here = words_of(conversation, tokenizer, turn, whole)
    start = _start(conversation, tokenizer, turn, before, here) if asked else here.start
    if start is None or here.start == here.stop:
        raise MalformedRow(
            f"the chat template writes the conversation up to turn {turn + 1} differently once it goes on, so the "
            "assistant's tokens cannot be identified; mark them in the template with {% generation %}"
        )
    if whole.startswith(after):
        return start, len(after)
    alone = words_of(replace(conversation, messages=conversation.messages[: turn + 1]), tokenizer, turn, after)
    behind = whole[here.stop :]
    shared = shared_prefix(alone.text[alone.stop :], behind)
    return start, here.stop + _between_tokens(behind, shared, tokenizer)


def words_of(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turn: int, text: str) -> Written:
    """The part of ``text``, the rendered conversation, that changes with the content of a turn."""
    messages = list(conversation.messages)
    message = messages[turn]
    calls = [
        {**call, "function": {"name": _OTHER, "arguments": {_OTHER: _OTHER}}} for call in message.get("tool_calls", ())
    ]
    # Beside calls, templates tell an empty content from another one.
    other: dict[str, Any] = {"content": _OTHER} if message["content"].strip() or not calls else {}
    messages[turn] = {**message, **other, **({"tool_calls": calls} if calls else {})}
    changed = replace(conversation, messages=messages).written(tokenizer).text
    start = shared_prefix(text, changed)
    rest = shared_prefix(text[start:][::-1], changed[start:][::-1])
    return Written(text, start, len(text) - rest)


def _start(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turn: int, before: str, here: Written
) -> int | None:
    """The start of an assistant's turn, after its generation prompt."""
    if turn and here.text.startswith(before):
        return len(before)
    if turn:
        earlier = conversation.written(tokenizer, turn).text
    else:
        # No template writes a conversation of no turns; a question may follow to see what prompts an answer.
        asking = replace(conversation, messages=[conversation.messages[0], {"role": "user", "content": _OTHER}])
        earlier, before = (asking.written(tokenizer, prompt=prompt).text for prompt in (False, True))
    if turn and here.text.startswith(earlier) and (shared := shared_prefix(before, here.text)) > len(earlier):
        return min(shared, here.start)
    prompt = before[len(earlier) :] if before.startswith(earlier) else ""
    # Not before the words of the turn before, whose own prompt it may be.
    first = words_of(conversation, tokenizer, turn - 1, here.text).stop if turn else 0
    place = here.text.rfind(prompt, first, here.start) if prompt else -1
    if place >= 0:
        return place + len(prompt)
    return None if turn else here.start


def _between_tokens(text: str, place: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """``place``, or where the control token begins that it would cut."""
    names = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
    if names:
        for token in re.finditer("|".join(map(re.escape, names)), text[: place + len(names[0])]):
            if token.start() < place < token.end():
                return token.start()
    return place
