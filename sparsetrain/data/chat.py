"""From a conversation to tokens, by the tokenizer's chat template, with loss on what the assistant says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from sparsetrain.data.encoding import encode, shared_prefix
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendered = tuple[list[int], list[tuple[int, int]]]
"""Tokens, and the half-open spans of them that carry loss."""


def render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Loss on what the assistant says, and on the token that ends its turn where the template counts it in.

    Raises:
        MalformedRow: no turn is the assistant's, or the template refuses the conversation.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise MalformedRow("no turn is the assistant's, so there is nothing to learn from")
    try:
        if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
            input_ids, targets = _marked_chat(messages, tokenizer)
        else:
            input_ids, targets = _prefix_chat(messages, tokenizer)
    except (TemplateError, TypeError, KeyError) as problem:
        raise MalformedRow(f"the chat template refuses it: {problem}") from problem
    if not targets:
        raise MalformedRow("the chat template leaves the assistant nothing to say")
    return input_ids, targets


def _marked_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The template itself marks the assistant's words with ``{% generation %}``."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    marks = np.diff([0, *encoded["assistant_masks"], 0])
    return encoded["input_ids"], list(zip(np.flatnonzero(marks > 0).tolist(), np.flatnonzero(marks < 0).tolist()))


def _prefix_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """An assistant's turn is what the conversation gains by it, as long as nothing before it changes.

    As in a completion, a token that reaches from the prompt into the turn counts to the turn.
    """

    def text(turns: int, *, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=prompt))

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
