"""From a row of a dataset to tokens and the spans of them that carry loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError

from sparsetrain.data.document import Tokens
from sparsetrain.data.encoding import encode, end_of_text, opening, shared_prefix
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import DataSource

RENDER_VERSION = 1
"""Raised whenever the same row would give other tokens, so that nothing cached before is used."""

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's names for the roles of a conversation."""

ALPACA_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
"""Prompt of an Alpaca row where the tokenizer has no chat template."""


class MalformedRow(ValueError):
    """A row that cannot be rendered, and why."""


@dataclass(frozen=True)
class RowForm:
    """How the rows of one source become tokens."""

    kind: Literal["text", "prompt_completion", "chat", "alpaca"]
    fields: tuple[str, ...]
    """The columns read, in the order the kind needs them."""


def resolve_form(source: DataSource, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> RowForm:
    """The form of a source with these columns.

    ``auto`` takes the first that fits of chat messages (also ShareGPT's ``conversations``), prompt + completion,
    Alpaca's ``instruction`` + ``output``, and text.

    Raises:
        DataError: a column is missing, no form fits, or chat is asked of a tokenizer without a chat template.
    """
    kind, fields = _kind_and_fields(source, columns)
    missing = [field for field in fields if field not in columns]
    if missing:
        near = get_close_matches(missing[0], columns, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"data source {source.label!r}: form {kind} needs a column {missing[0]!r}{hint}; "
            f"it has {_listed(columns)}. Name the column with {_FIELD_SETTINGS[kind]}"
        )
    if kind == "alpaca" and "input" in columns:
        fields = (*fields, "input")
    if kind == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"data source {source.label!r} holds chat messages, but the tokenizer has no chat template; set "
            "model.tokenizer to an instruction-tuned model's, or train on form text or prompt_completion"
        )
    return RowForm(kind, fields)


_FIELD_SETTINGS = {
    "text": "text_field",
    "prompt_completion": "prompt_field and completion_field",
    "chat": "messages_field",
    "alpaca": "form",
}


def _kind_and_fields(
    source: DataSource, columns: Sequence[str]
) -> tuple[Literal["text", "prompt_completion", "chat", "alpaca"], tuple[str, ...]]:
    pair = (source.prompt_field, source.completion_field)
    match source.form:
        case "text":
            return "text", (source.text_field,)
        case "prompt_completion":
            return "prompt_completion", pair
        case "chat":
            return "chat", (source.messages_field,)
    if source.messages_field in columns:
        return "chat", (source.messages_field,)
    if "conversations" in columns:
        return "chat", ("conversations",)
    if all(field in columns for field in pair):
        return "prompt_completion", pair
    if "instruction" in columns and "output" in columns:
        return "alpaca", ("instruction", "output")
    if source.text_field in columns:
        return "text", (source.text_field,)
    near = get_close_matches(source.text_field, columns, n=1)
    hint = f" (did you mean text_field: {near[0]}?)" if near else ""
    raise DataError(
        f"data source {source.label!r}: its columns {_listed(columns)} fit no known form{hint}. Set form, and "
        "text_field, prompt_field and completion_field, or messages_field, to say how a row becomes tokens"
    )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "no columns"


def render(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokens of one row; none for an empty text.

    Text and prompt + completion begin with BOS where the tokenizer puts one and end with EOS; a chat begins and ends
    as its template says.

    Raises:
        MalformedRow: a column is missing or of the wrong type, the completion is empty, no turn is the assistant's, or
            the chat template refuses the conversation.
    """
    match form.kind:
        case "text":
            input_ids, targets = _text(_string(row, form.fields[0]), tokenizer)
        case "prompt_completion":
            input_ids, targets = _completion(_string(row, form.fields[0]), _string(row, form.fields[1]), tokenizer)
        case "chat":
            input_ids, targets = _chat(_messages(row, form.fields[0]), tokenizer)
        case "alpaca":
            input_ids, targets = _alpaca(row, form, tokenizer)
    return Tokens(np.array(input_ids, dtype=np.int32), targets)


Rendered = tuple[list[int], list[tuple[int, int]]]


def _text(text: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if not text.strip():
        return [], []
    input_ids = [*opening(tokenizer), *encode(tokenizer, text), end_of_text(tokenizer)]
    return input_ids, [(1, len(input_ids))]


def _completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Loss on the completion and EOS. A token that reaches over the boundary counts to the completion."""
    if not completion.strip():
        raise MalformedRow("the completion is empty")
    start = opening(tokenizer)
    asked = start + encode(tokenizer, prompt)
    input_ids = [*start, *encode(tokenizer, prompt + completion), end_of_text(tokenizer)]
    return input_ids, [(max(1, shared_prefix(asked, input_ids)), len(input_ids))]


def _alpaca(row: Mapping[str, Any], form: RowForm, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    instruction, answer = _string(row, "instruction"), _string(row, "output")
    if "input" in form.fields and row.get("input"):
        instruction = f"{instruction}\n\n{_string(row, 'input')}"
    if not tokenizer.chat_template:
        return _completion(ALPACA_PROMPT.format(instruction=instruction), answer, tokenizer)
    return _chat([{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}], tokenizer)


def _chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Loss on what the assistant says, and on the token that ends its turn where the template counts it in."""
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


def _messages(row: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    turns = _value(row, field)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise MalformedRow(f"{field!r} is {_described(turns)}, not a list of turns")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, number: int) -> dict[str, Any]:
    """``{role, content}``, from that or from ShareGPT's ``{from, value}``."""
    if not isinstance(turn, Mapping):
        raise MalformedRow(f"turn {number} is {_described(turn)}, not a mapping with role and content")
    present = {key: value for key, value in turn.items() if value is not None}
    role = present.pop("role", None) or present.pop("from", None)
    content = present.pop("content", None) if "content" in present else present.pop("value", None)
    if not isinstance(role, str):
        raise MalformedRow(f"turn {number} has no role")
    role = ROLES.get(role, role)
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise MalformedRow(f"turn {number} has the unknown role {role!r}")
    return {**present, "role": role, "content": _text_value(content, f"the content of turn {number}")}


def _string(row: Mapping[str, Any], field: str) -> str:
    return _text_value(_value(row, field), repr(field))


def _text_value(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise MalformedRow(f"{name} is {_described(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        raise MalformedRow(f"{name} is no valid Unicode: {problem.reason} at character {problem.start}") from problem
    return value


def _value(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise MalformedRow(f"it has no {field!r}, only {_listed(list(row))}")
    return row[field]


def _described(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
