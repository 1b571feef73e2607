"""Convert a conversation to tokens with the tokenizer's chat template, with loss on the assistant's turns."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sparsetrain.data.chat_template import marks_generation
from sparsetrain.data.conversation import Conversation
from sparsetrain.data.encoding import PIECE, Rendered, encode, tokenized, tokens_up_to
from sparsetrain.data.ending import with_end_tokens
from sparsetrain.data.stretches import places_of
from sparsetrain.data.template_coverage import check_coverage
from sparsetrain.data.turns import added
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render a conversation with loss on assistant turns and their end tokens, or on the spans that the row selects.

    The result is empty if the row selects nothing.

    Raises:
        MalformedRow: There is no assistant turn, or the template refuses the conversation or omits a part of it.
        DataError: The template cannot be compiled, or does not terminate.
    """
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise MalformedRow("it has no assistant turn, so there is nothing to learn")
    if not any(conversation.learns(turn) for turn in range(len(conversation.messages))):
        return [], []
    conversation = _without_doubles(conversation, tokenizer)
    render = _marked_chat if marks_generation(tokenizer, conversation.tools) else _prefix_chat
    input_ids, targets = with_end_tokens(render(conversation, tokenizer), tokenizer)
    if not targets:
        raise MalformedRow("the chat template writes nothing for the assistant's turns")
    return input_ids, targets


def _without_doubles(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """Remove BOS and EOS from contents that were rendered before, if the template writes them."""
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    contents = [str(message["content"]) for message in conversation.messages]
    if not any((bos and each.lstrip().startswith(bos)) or (eos and each.rstrip().endswith(eos)) for each in contents):
        return conversation
    text = conversation.written(tokenizer).text
    if bos and text.lstrip().startswith(bos):
        contents = [each.lstrip().removeprefix(bos) if each.lstrip().startswith(bos) else each for each in contents]
    if eos and re.search(rf"{re.escape(eos)}\s*{re.escape(eos)}", text):
        contents = [each.rstrip().removesuffix(eos) if each.rstrip().endswith(eos) else each for each in contents]
    pairs = zip(conversation.messages, contents)
    return replace(conversation, messages=[{**message, "content": content} for message, content in pairs])


def _marked_chat(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render with a template that marks the assistant's text with ``{% generation %}``."""
    text, spans = conversation.written(tokenizer)
    check_coverage(conversation, tokenizer, text)
    if conversation.chosen:
        spans = _chosen_spans(conversation, tokenizer, text, spans)
    return _in_tokens(spans, text, tokenizer, over_end=True)


def _chosen_spans(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, marked: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The spans marked by the template that the row selects for learning.

    The marks of a turn are those that the turn adds to the conversation.
    """
    chosen: list[tuple[int, int]] = []
    known = 0
    for turn, message in enumerate(conversation.messages):
        count = len(conversation.written(tokenizer, turn + 1).spans)
        own, known = marked[known:count], max(known, count)
        learned = conversation.learns(turn)
        if not learned:
            continue
        if message["role"] != "assistant":
            chosen += _learned_spans(conversation, turn, text, added(conversation, tokenizer, turn, text))
            continue
        for span in own:
            chosen += _learned_spans(conversation, turn, text, span) if learned is not True else [span]
    if known != len(marked):
        raise MalformedRow(
            "the chat template marks other text when the conversation continues, so turns without loss "
            "cannot be distinguished from the others"
        )
    return sorted(chosen)


def _prefix_chat(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render with loss on the text that each assistant turn adds to the conversation.

    As in a completion, a token that overlaps prompt and turn belongs to the turn.
    """
    whole = conversation.written(tokenizer).text
    check_coverage(conversation, tokenizer, whole)
    turns = [turn for turn in range(len(conversation.messages)) if conversation.learns(turn)]
    places = places_of(conversation, tokenizer, turns, whole)
    spans = [span for turn, place in zip(turns, places) for span in _learned_spans(conversation, turn, whole, place)]
    return _in_tokens(spans, whole, tokenizer)


def _in_tokens(
    spans: list[tuple[int, int]], text: str, tokenizer: PreTrainedTokenizerBase, *, over_end: bool = False
) -> Rendered:
    """The tokens of a text, with spans of characters as spans of tokens.

    Args:
        over_end: a token that reaches over the end of a span belongs to it, as one does that reaches over its start.
    """
    if not tokenizer.is_fast or len(text) > PIECE:
        input_ids = encode(tokenizer, text)
        edges = tokens_up_to(tokenizer, text, input_ids, [edge for span in spans for edge in span])
        return input_ids, [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]
    # Not by the tokens of the text before a span: in front of a word, some tokenizers cut white space otherwise.
    encoded = tokenized(tokenizer, text, offsets=True)
    starts, stops = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
    learned = np.zeros(len(starts), dtype=np.int8)
    for start, stop in spans:
        learned[((starts < stop) if over_end else (stops <= stop)) & (stops > start)] = 1
    marks = np.diff([0, *learned, 0])
    return encoded["input_ids"], list(zip(np.flatnonzero(marks > 0).tolist(), np.flatnonzero(marks < 0).tolist()))


def _learned_spans(conversation: Conversation, turn: int, text: str, place: tuple[int, int]) -> list[tuple[int, int]]:
    """The learned spans of a turn, in characters of the whole text.

    For an assistant turn these are all characters that it adds; for another role its content and the end of the turn;
    for a turn with selected parts these parts, the last one with the end of the turn.
    """
    learned = conversation.learns(turn)
    message = conversation.messages[turn]
    if learned is True and message["role"] == "assistant":
        return [place]
    start, stop = place
    content = message["content"].strip()
    found = text.find(content, start, stop)
    if not content or found < 0:
        raise MalformedRow(f"the chat template changes the content of turn {turn + 1}, so its parts cannot be found")
    if learned is True:
        return [(found, stop)]
    assert isinstance(learned, tuple)
    cut = len(message["content"]) - len(message["content"].lstrip())
    spans = [(max(0, first - cut), min(last - cut, len(content))) for first, last in learned]
    return [(found + first, stop if last == len(content) else found + last) for first, last in spans if first < last]
