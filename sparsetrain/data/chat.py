"""From a conversation to tokens, by the tokenizer's chat template, with loss on what the assistant says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.data.chat_template import apply_template, marks_generation
from sparsetrain.data.encoding import encode, shared_prefix
from sparsetrain.data.ending import with_end_tokens
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendered = tuple[list[int], list[tuple[int, int]]]
"""Tokens, and the half-open spans of them that carry loss."""


def render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Loss on what the assistant says, and on the token that ends its turn.

    Raises:
        MalformedRow: no turn is the assistant's, or the template refuses the conversation.
        DataError: the template cannot be compiled, or does not come to an end.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise MalformedRow("no turn is the assistant's, so there is nothing to learn from")
    render = _marked_chat if marks_generation(tokenizer) else _prefix_chat
    input_ids, targets = with_end_tokens(render(messages, tokenizer), tokenizer)
    if not targets:
        raise MalformedRow("the chat template leaves the assistant nothing to say")
    return input_ids, targets


def _marked_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The template itself marks the assistant's words with ``{% generation %}``."""
    text, spans = apply_template(tokenizer, messages)
    if not tokenizer.is_fast:
        input_ids = encode(tokenizer, text)
        edges = [tuple(shared_prefix(encode(tokenizer, text[:edge]), input_ids) for edge in span) for span in spans]
        return input_ids, [(start, stop) for start, stop in edges if start < stop]
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False)
    starts, stops = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
    learned = np.zeros(len(starts), dtype=np.int8)
    for start, stop in spans:
        learned[(starts < stop) & (stops > start)] = 1
    marks = np.diff([0, *learned, 0])
    return encoded["input_ids"], list(zip(np.flatnonzero(marks > 0).tolist(), np.flatnonzero(marks < 0).tolist()))


def _prefix_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """An assistant's turn is what the conversation gains by it, as long as nothing before it changes.

    As in a completion, a token that reaches from the prompt into the turn counts to the turn.
    """

    def text(turns: int, *, prompt: bool = False) -> str:
        return apply_template(tokenizer, messages[:turns], prompt=prompt).text

    whole = text(len(messages))
    input_ids = encode(tokenizer, whole)
    targets = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text(turn, prompt=True) if turn else "", text(turn + 1)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise MalformedRow(
                f"the chat template writes the conversation up to turn {turn + 1} differently once it goes on, so the "
                "assistant's tokens cannot be told apart; mark them in the template with {% generation %}"
            )
        start, stop = (shared_prefix(encode(tokenizer, part), input_ids) for part in (before, after))
        if start < stop:
            targets.append((start, stop))
    return input_ids, targets
