"""Convert a row of a dataset to tokens and the spans with loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.data.answers import answers
from sparsetrain.data.chat import render_chat
from sparsetrain.data.conversation import Conversation, conversation_of
from sparsetrain.data.document import PairTokens, Tokens
from sparsetrain.data.encoding import Rendered, Stripped, encode, end_of_text, opening, shared_prefix, strip_ends
from sparsetrain.data.forms import RowForm
from sparsetrain.data.known_columns import INPUTS, SETTINGS, SYSTEM, TOOLS, check_columns
from sparsetrain.data.pretokenized import read_tokens
from sparsetrain.data.tools import tools_of
from sparsetrain.data.values import MalformedRow, described, listed, parsed, string, text_value, value_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_VERSION = 13
"""Increased whenever the tokens of a row would change, which invalidates the cache."""

ALPACA_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
"""Prompt of an Alpaca row where the tokenizer has no chat template."""

_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message")
_USUAL: dict[str, Any] = {"tool_choice": "auto", "parallel_tool_calls": True}


def render(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Render the tokens of one row; empty for an empty text, or if the row selects nothing to learn.

    Text and prompt + completion begin with BOS (if the tokenizer uses one) and end with EOS, each exactly once, even if
    the text contains them already. A chat begins and ends as its template says. Pretokenised rows are not changed. Of a
    pair, both documents are rendered, one behind the other.

    Raises:
        MalformedRow: A column is missing, has the wrong type or an unsupported value; no assistant turn; or the
            chat template refuses the conversation or omits a part of it.
    """
    row = form.naming.row(row)
    check_columns(row, form.kind, form.fields, form.ignore)
    if found := [column for column in form.contrary if row.get(column)]:
        raise MalformedRow(
            f"it has {listed(found)}, which the first row lacks, so that rows are read as {form.kind}; set form to say "
            f"what they are, or leave the column out by ignore: [{found[0]}]"
        )
    try:
        if form.kind == "preference":
            return _pair(row, form, tokenizer)
        input_ids, targets = _rendered(row, form, tokenizer)
    except RecursionError as problem:
        raise MalformedRow("it is nested too deeply") from problem
    return Tokens(np.array(input_ids, dtype=np.int32), targets)


def _pair(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Both answers, each behind the prompt; empty if they are equal."""
    rows = answers(row, form)
    if rows is None:
        return Tokens(np.empty(0, np.int32), [])
    if rows[0].form.kind == "text":
        _no_conversation(row, form, "its answers are plain text")
    chosen, rejected = (_rendered(each.row, each.form, tokenizer) for each in rows)
    if rows[0].form.kind == "text":
        # What both begin with is the prompt: its tokens are as likely in either.
        shared = shared_prefix(chosen[0], rejected[0])
        if shared <= len(opening(tokenizer)):
            remedy = f", and {form.fields[2]!r} is empty" if form.fields[2:] else "; name its column with prompt_field"
            raise MalformedRow(f"{form.fields[0]!r} and {form.fields[1]!r} do not begin with a prompt{remedy}")
        chosen, rejected = ((ids, [(shared, len(ids))] if shared < len(ids) else []) for ids, _ in (chosen, rejected))
    for name, (_, targets) in zip(form.fields, (chosen, rejected)):
        if not targets:
            raise MalformedRow(f"{name!r} has nothing to learn behind the prompt")
    start = len(chosen[0])
    targets = chosen[1] + [(start + max(1, first), start + last) for first, last in rejected[1]]
    return PairTokens(np.array(chosen[0] + rejected[0], dtype=np.int32), targets, start)


def _rendered(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    match form.kind:
        case "text":
            return _text(string(row, form.fields[0]), tokenizer)
        case "prompt_completion":
            return _prompt_completion(row, form, tokenizer)
        case "chat":
            turns = value_of(row, form.fields[0])
            if isinstance(turns, str) and turns.lstrip().startswith("["):
                turns = parsed(turns, repr(form.fields[0]))
            conversation = conversation_of(turns, repr(form.fields[0]), form.ignore, form.naming)
            return render_chat(with_columns(conversation, row, form), tokenizer)
        case "alpaca":
            return _alpaca(row, form, tokenizer)
        case "tokens":
            return read_tokens(row, form.fields[0], form.optional, len(tokenizer))
        case "preference":
            raise AssertionError("a pair is two documents")


def _text(text: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    own = strip_ends(text, tokenizer)
    if own.empty(tokenizer):
        return [], []
    input_ids = _whole(own, encode(tokenizer, own.text), tokenizer)
    return input_ids, [(1, len(input_ids))]


def _whole(own: Stripped, input_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document with the one BOS and the one EOS that it should have."""
    start = [] if own.opened else opening(tokenizer)
    return [*start, *input_ids] if own.ended else [*start, *input_ids, end_of_text(tokenizer)]


def _prompt_completion(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    prompt, completion = (value_of(row, field) for field in form.fields)
    if isinstance(prompt, str) and isinstance(completion, str):
        _no_conversation(row, form, "its prompt and completion are plain text")
        names = (repr(field) for field in form.fields)
        prompt, completion = (text_value(value, name) for value, name in zip((prompt, completion), names))
        return _completion(prompt + form.separator, completion, tokenizer)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        wrong = next(field for field in form.fields if not isinstance(row[field], str))
        raise MalformedRow(f"{wrong!r} is {described(row[wrong])}, not a string, and not both are lists of turns")
    if form.separator:
        raise MalformedRow("separator has no effect on prompts and completions that are lists of turns")
    _needs_template(tokenizer, "its prompt and completion are lists of turns")
    asked, answered = (
        conversation_of(value_of(row, field), repr(field), form.ignore, form.naming) for field in form.fields
    )
    if not any(message["role"] == "assistant" for message in answered.messages):
        raise MalformedRow("the completion has no assistant turn, so there is nothing to learn")
    learned = [False] * len(asked.messages) + answered.learned
    conversation = Conversation(asked.messages + answered.messages, learned)
    return render_chat(with_columns(conversation, row, form), tokenizer)


def _completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Loss on the completion and EOS, on EOS alone of an empty completion: the answer is to say nothing, as a chat's
    empty turn. A token that reaches over the boundary counts to the completion."""
    answer, own = strip_ends(completion, tokenizer), strip_ends(prompt, tokenizer, end=False)
    if answer.empty(tokenizer):
        if own.empty(tokenizer):
            return [], []
        answer = Stripped("", answer.opened, False)
    text = answer.text
    if answer.opened and own.text:
        # It would stand inside of the document.
        text = text.removeprefix(str(tokenizer.bos_token))
    opened = own.opened or (answer.opened and not own.text)
    asked = ([] if opened else opening(tokenizer)) + encode(tokenizer, own.text)
    input_ids = _whole(Stripped("", opened, answer.ended), encode(tokenizer, own.text + text), tokenizer)
    return input_ids, [(max(1, shared_prefix(asked, input_ids)), len(input_ids))]


def _alpaca(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    instruction, answer = (string(row, field) for field in form.fields)
    given = {name: string(row, name) for name in INPUTS if name in form.optional and row.get(name)}
    if len(given) > 1:
        raise MalformedRow(f"it has both {' and '.join(given)}; ignore one of them, or join them in the data")
    instruction = "\n\n".join((instruction, *given.values()))
    history = _history(row) if "history" in form.optional else []
    if not tokenizer.chat_template:
        _no_conversation(row, form, "it needs a chat template, and the tokenizer has none", allowed=SYSTEM)
        if history:
            raise MalformedRow(
                "column 'history' cannot be honoured: the tokenizer has no chat template; set model.chat_template"
            )
        system = _system(row, form)
        prompt = ALPACA_PROMPT.format(instruction=instruction)
        return _completion(f"{system}\n\n{prompt}" if system else prompt, answer, tokenizer)
    pairs = [*history, (instruction, answer)]
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair)]
    conversation = Conversation([{"role": role, "content": content} for role, content in turns])
    return render_chat(with_columns(conversation, row, form), tokenizer)


def _history(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Alpaca's earlier turns: ``[[instruction, answer], ...]``."""
    pairs = parsed(row.get("history"), "'history'") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise MalformedRow("'history' is not a list of pairs of instruction and answer")
    return [(text_value(asked, "'history'"), text_value(answered, "'history'")) for asked, answered in pairs]


def with_columns(conversation: Conversation, row: Mapping[str, Any], form: RowForm) -> Conversation:
    """A conversation with what its row says in other columns.

    Raises:
        MalformedRow: a column cannot be read, or contradicts another one or the turns.
    """
    tools = [found for name in form.optional if name in TOOLS if (found := tools_of(row.get(name), repr(name)))]
    if len(tools) > 1:
        raise MalformedRow("it has both tools and functions")
    settings = dict(pair for column in form.optional if column in SETTINGS for pair in _settings(row, column))
    return replace(conversation, tools=tools[0] if tools else None, settings=settings).behind(_system(row, form))


def _settings(row: Mapping[str, Any], column: str) -> Iterator[tuple[str, Any]]:
    """More variables of the template, that a column holds or is."""
    if column != "chat_template_kwargs":
        value = parsed(row.get(column), repr(column)) if column == "documents" else row.get(column)
        # What models do unless they are told otherwise needs no template that reads it.
        if value not in (None, "", [], _USUAL.get(column)):
            yield column, value
        return
    value = parsed(row.get(column), repr(column))
    if value is not None and not isinstance(value, Mapping):
        raise MalformedRow(f"{column!r} is {described(value)}, not a mapping")
    for name, setting in (value or {}).items():
        if name in _OWN_VARIABLES:
            raise MalformedRow(f"{column!r} sets {name!r}, which is not a row's to set")
        yield name, setting


def _system(row: Mapping[str, Any], form: RowForm) -> str | None:
    said = {name: string(row, name) for name in form.optional if name in SYSTEM and row.get(name) not in (None, "")}
    if len(set(said.values())) > 1:
        raise MalformedRow(f"it has two different system prompts, in {' and '.join(map(repr, said))}")
    return next(iter(said.values()), None)


def _no_conversation(row: Mapping[str, Any], form: RowForm, reason: str, allowed: tuple[str, ...] = ()) -> None:
    """Refuse what belongs to a conversation, where there is none."""
    for name in form.optional:
        if name in (*SYSTEM, *TOOLS, *SETTINGS) and name not in allowed and row.get(name) not in (None, "", [], {}):
            raise MalformedRow(f"column {name!r} cannot be honoured: {reason}; ignore: [{name}] trains without it")


def _needs_template(tokenizer: PreTrainedTokenizerBase, reason: str) -> None:
    if not tokenizer.chat_template:
        raise MalformedRow(f"{reason}, but the tokenizer has no chat template; set model.chat_template")
