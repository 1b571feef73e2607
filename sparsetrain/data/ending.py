"""Find the token that ends an assistant's turn, which the model must learn so that generation stops."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sparsetrain.data.chat_template import apply_template, marks_generation
from sparsetrain.data.encoding import Rendered, encode
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a template is tried with: words that it does not write itself.
_QUESTIONS, _ANSWERS = ("Quokka?", "Quetzal?"), ("Aardvark.", "Axolotl.")
_LOOKS_LIKE_A_TOKEN = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_[a-z_]+>|</?s>|<(?:bos|eos|pad|unk)>")


@dataclass(frozen=True)
class Ending:
    """The tokens that a chat template writes at the end of an assistant's turn."""

    kind: Literal["learned", "left out", "next role", "none", "unknown"]
    """The end token is part of the turn; stands behind the words that ``{% generation %}`` marks; is that with which
    the next role's turn begins; there is none; or the template refused the conversation that it was tried with."""
    token: int | None = None
    """The end token."""
    others: tuple[int, ...] = ()
    """Other end tokens: that with which a tool's turn begins, where it is another than the user's."""
    inner: int | None = None
    """The token that ends a turn before the last one, if it is another token; generation does not stop there."""
    gap: tuple[int, ...] = ()
    """Tokens between the turn and its end token, where that is not part of it."""
    control: tuple[int, ...] = ()
    """All control tokens that the template writes, ascending."""
    in_pieces: tuple[tuple[str, int], ...] = ()
    """A text that looks like a control token but is none, and its number of tokens."""


@lru_cache(maxsize=8)
def _ending(tokenizer: PreTrainedTokenizerBase, template: str) -> Ending:
    """Cached for the template as well, which may be replaced."""
    turns = [
        {"role": role, "content": content}
        for pair in zip(_QUESTIONS, _ANSWERS)
        for role, content in zip(("user", "assistant"), pair)
    ]
    try:
        text, spans = apply_template(tokenizer, turns)
    except MalformedRow:
        return Ending("unknown")
    if any(text.count(word) != 1 for word in (*_QUESTIONS, *_ANSWERS)):
        return Ending("unknown")
    tokens = control_tokens(tokenizer)
    written = [token for token in encode(tokenizer, text) if token in tokens]
    pieces = ((each, len(encode(tokenizer, each))) for each in sorted(set(_LOOKS_LIKE_A_TOKEN.findall(text))))
    known: dict[str, Any] = {
        "control": tuple(sorted(set(written))),
        "in_pieces": tuple((each, count) for each, count in pieces if count > 1),
    }
    stop = text.index(_ANSWERS[1]) + len(_ANSWERS[1])
    gap, token = _first(encode(tokenizer, text[stop:]), tokens)
    if token is not None:
        marked = text[stop : spans[-1][1]] if spans else text[stop:]
        learned = _first(encode(tokenizer, marked), tokens)[1] == token
        return Ending(
            "learned" if learned else "left out", token, (), _inner_end(text, token, turns, tokenizer), gap, **known
        )
    gap, token = _between(text, _ANSWERS[0], _QUESTIONS[1], tokenizer, tokens)
    if token is None or str(tokenizer.decode(list(gap))).strip():
        return Ending("none", **known)
    others: set[int | None] = set()
    with suppress(MalformedRow):
        turns[2]["role"] = "tool"
        with_tool = apply_template(tokenizer, turns).text
        others = {_between(with_tool, _ANSWERS[0], _QUESTIONS[1], tokenizer, tokens)[1]}
        others -= {token, _between(text, _QUESTIONS[0], _ANSWERS[0], tokenizer, tokens)[1]}
    return Ending("next role", token, tuple(filter(None, others)), None, gap, **known)


def _inner_end(text: str, token: int, turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends the first answer, if it is another than ``token``, which ends the last.

    It stands before that with which every turn begins, as it does where the template prompts an answer.
    """
    tokens = control_tokens(tokenizer)
    place = text.index(_ANSWERS[0]) + len(_ANSWERS[0])
    written = [each for each in encode(tokenizer, text[place : text.index(_QUESTIONS[1])]) if each in tokens]
    if len(written) < 2 or written[0] == token:
        return None
    with suppress(MalformedRow):
        asked, prompted = (apply_template(tokenizer, turns[:1], prompt=prompt).text for prompt in (False, True))
        if _first(encode(tokenizer, prompted.removeprefix(asked)), tokens)[1] == written[1]:
            return written[0]
    return None


def _between(
    text: str, left: str, right: str, tokenizer: PreTrainedTokenizerBase, tokens: set[int]
) -> tuple[tuple[int, ...], int | None]:
    """The first control token between two words, and what stands before it."""
    begin = text.index(left) + len(left)
    return _first(encode(tokenizer, text[begin : text.find(right, begin)]), tokens)


def turn_ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """The ending of assistant turns in the tokenizer's chat template.

    Raises:
        DataError: The template cannot be compiled.
    """
    marks_generation(tokenizer)
    return _ending(tokenizer, str(tokenizer.chat_template))


def remarks(ending: Ending, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Notes for the user about the template's tokens, one sentence each."""
    name = None if ending.token is None else repr(tokenizer.convert_ids_to_tokens(ending.token))
    lines = [
        f"the chat template writes {text!r}, which is not a token of this tokenizer: it is split into {count}. If it "
        f"is meant to be one, add it (model.add_tokens: [{text!r}]), or use the tokenizer that the template belongs to "
        "(model.tokenizer)"
        for text, count in ending.in_pieces
    ]
    match ending.kind:
        case "left out":
            lines.append(
                f"the marks of {{% generation %}} leave out {name}, which ends the turn; it is learned as well"
            )
        case "next role":
            lines.append(
                f"the chat template ends an assistant's turn with {name}, where the next one begins; it is learned "
                "there, and put behind the last turn of a conversation"
            )
        case "none":
            lines.append(
                "the chat template ends an assistant's turn with no control token, so the model does not learn to "
                "stop; write the EOS token behind the assistant's content in the template"
            )
        case "unknown":
            lines.append(
                "the chat template refuses a plain conversation of user and assistant, so it is not known whether the "
                "token that ends a turn is learned"
            )
    return lines


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that are never merged with text: special tokens, and others that were added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def with_end_tokens(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Add the end token to every learned turn of a chat.

    If it is the token that opens the next role's turn, it is appended to the last turn of the conversation.
    """
    ending = turn_ending(tokenizer)
    if ending.token is None or (ending.kind == "learned" and ending.inner is None):
        return rendered
    input_ids, targets = list(rendered[0]), []
    tokens = control_tokens(tokenizer)
    for start, stop in rendered[1]:
        if stop == len(input_ids) and ending.kind == "next role":
            input_ids += [*ending.gap, ending.token]
        # Among as many tokens as the gap had: white space may be cut in another way behind other words.
        gap, token = _first(input_ids[stop : stop + len(ending.gap) + 2], tokens)
        ends = (
            token is not None
            and token in (ending.token, *ending.others, ending.inner)
            and not str(tokenizer.decode(list(gap))).strip()
        )
        targets.append((start, stop + len(gap) + 1 if ends else stop))
    return input_ids, targets


def _first(input_ids: list[int], wanted: set[int]) -> tuple[tuple[int, ...], int | None]:
    """The first of the wanted tokens and the tokens before it; all tokens if there is none."""
    place = next((place for place, token in enumerate(input_ids) if token in wanted), None)
    return (tuple(input_ids), None) if place is None else (tuple(input_ids[:place]), input_ids[place])
