"""Columns with a meaning in common formats, which are read or refused by name. All others are metadata."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from sparsetrain.data.conversation import REFUSED, ROLES
from sparsetrain.data.values import MalformedRow, listed

Kind = Literal["text", "prompt_completion", "chat", "alpaca", "tokens", "preference"]

SYSTEM = ("system", "system_prompt", "system_message")
"""Columns of a system prompt."""
TOOLS = ("tools", "functions")
"""Columns of the tools that may be called."""
SETTINGS = ("chat_template_kwargs", "documents", "tool_choice", "parallel_tool_calls")
"""Columns of more variables of the chat template."""
MASKS = ("attention_mask", "completion_mask", "assistant_masks", "loss_mask")
"""Columns beside ``input_ids`` that leave tokens out."""

INPUTS = ("input", "context", "article", "passage")
"""Columns of what an instruction or question is about."""

OF_CONVERSATIONS = (*SYSTEM, *TOOLS, *SETTINGS)
_READ: dict[Kind, tuple[str, ...]] = {
    "text": (),
    "prompt_completion": OF_CONVERSATIONS,
    "chat": OF_CONVERSATIONS,
    "alpaca": (*OF_CONVERSATIONS, *INPUTS, "history"),
    "tokens": ("labels", *MASKS),
    "preference": OF_CONVERSATIONS,
}

_PREFERENCE = (
    "it belongs to preference data, which a recipe with a preference section reads; to train on the better answers "
    "alone, set form: prompt_completion, completion_field: chosen (or form: chat, messages_field: chosen)"
)
_WEIGHT = "every row weighs the same; give sources a weight instead"
_LABEL = "it says that this answer is a bad one, which would be learned; data.on_malformed: skip leaves such rows out"
_TOKENS = "the row is tokenised here; form: tokens takes its own tokens"
_PLACES = "there is no conversation that it could belong to; form: chat reads it"
_PROMPT = "the prompt is taken as it stands; write it into the prompt"
_TURN = "the row is one turn of a conversation; write each conversation as one row with its turns in 'messages'"
_CORRECTED = "the output is an answer that it corrects; write the better one as the output"
_MASK = "tools differ in what it leaves out; write train: true or false into the turns, or labels beside input_ids"
_CHOICES = "the answers to choose from are not part of the question; write them into it"
_REFUSALS: dict[str, str] = {
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    **dict.fromkeys(
        ("preferred_output", "non_preferred_output", "rejected_response", "rejected_messages"), _PREFERENCE
    ),
    "kto_tag": _LABEL,
    "label": _LABEL,
    **dict.fromkeys(("weight", "sample_weight", "loss_weight"), _WEIGHT),
    **dict.fromkeys(("input_ids", "labels", "position_ids", *MASKS), _TOKENS),
    "mask": _MASK,
    "seq_lengths": "a row is one document; write the documents that were packed into it as rows of their own",
    **dict.fromkeys((*OF_CONVERSATIONS, "history"), _PLACES),
    "chat_template": "all rows are written by the tokenizer's own",
    **REFUSED,
}
_REFUSALS_OF_FORM: dict[Kind, dict[str, str]] = {
    "text": dict.fromkeys(("role", "parent_id"), _TURN),
    "prompt_completion": dict.fromkeys((*INPUTS, "instruction"), _PROMPT),
    "chat": {},
    "alpaca": {
        **dict.fromkeys(("choices", "options"), _CHOICES),
        **dict.fromkeys(("reflection", "corrected"), _CORRECTED),
    },
    "tokens": {},
    "preference": {},
}
"""Columns with a meaning in rows of one form alone."""
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("weight", "sample_weight", "loss_weight"), lambda value: value == 1),
    # A class is a number or a name, and no matter of the text beside it; a good answer is learned anyway.
    **dict.fromkeys(("label", "kto_tag"), lambda value: value is not False),
    "role": lambda value: str(value).lower() not in ROLES,
    "position_ids": lambda value: isinstance(value, list) and value == list(range(len(value))),
    # One document.
    "seq_lengths": lambda value: isinstance(value, list) and len(value) == 1,
    "refusal": lambda value: True,
}


def read_columns(kind: Kind, ignore: Collection[str]) -> tuple[str, ...]:
    """The columns that a form reads beside those that it needs, where a row has them."""
    return tuple(column for column in _READ[kind] if column not in ignore)


def check_prompt(row: Mapping[str, Any], *, chat: bool) -> None:
    """Refuse a row to continue with a value in a column that would be left out of its prompt.

    Args:
        chat: the prompt is a conversation, to which tools, a system prompt and variables of the template belong.

    Raises:
        MalformedRow: such a column is neither null nor empty.
    """
    reasons = {"history": "it is no part of the prompt; write its turns into messages"}
    reasons |= {column: _REFUSALS[column] for column in ("chat_template", *REFUSED)}
    if not chat:
        reasons |= dict.fromkeys(OF_CONVERSATIONS, "the prompt is plain text; --chat writes it as a user's message")
    for column, reason in reasons.items():
        if _says_something(column, row.get(column)):
            raise MalformedRow(f"column {column!r} cannot be honoured: {reason}, or rename the column to do without it")


def check_columns(row: Mapping[str, Any], kind: Kind, fields: Collection[str], ignore: Collection[str]) -> None:
    """Refuse a row with a value in a column that its form does not support.

    Args:
        fields: columns that the form needs; they are read whatever they are called.
        ignore: columns that the recipe leaves out.

    Raises:
        MalformedRow: such a column is neither null nor empty.
    """
    refusals = _REFUSALS | _REFUSALS_OF_FORM[kind]
    found = [
        column
        for column, value in row.items()
        if column in refusals and column not in (*fields, *ignore, *_READ[kind]) and _says_something(column, value)
    ]
    if found:
        reasons = "; ".join(dict.fromkeys(refusals[column] for column in found))
        raise MalformedRow(
            f"column{'s' if found[1:] else ''} {listed(found)} cannot be honoured: {reasons}; "
            f"ignore: [{', '.join(found)}] trains without {'them' if found[1:] else 'it'}"
        )


def _says_something(column: str, value: Any) -> bool:
    if value is None or (isinstance(value, str | Sequence | Mapping) and not len(value)):
        return False
    return column not in _HARMLESS or not _HARMLESS[column](value)
