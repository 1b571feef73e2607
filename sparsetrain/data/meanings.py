"""Columns with a meaning in the usual formats: read, or refused by name. All others are metadata."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from sparsetrain.data.conversation import REFUSED
from sparsetrain.data.values import MalformedRow

Kind = Literal["text", "prompt_completion", "chat", "alpaca", "tokens"]

SYSTEM = ("system", "system_prompt")
"""Columns of a system prompt."""
TOOLS = ("tools", "functions")
"""Columns of the tools that may be called."""
SETTINGS = ("chat_template_kwargs", "documents", "tool_choice", "parallel_tool_calls")
"""Columns of more variables of the chat template."""
MASKS = ("attention_mask", "completion_mask", "assistant_masks", "loss_mask")
"""Columns beside ``input_ids`` that leave tokens out."""

_OF_CONVERSATIONS = (*SYSTEM, *TOOLS, *SETTINGS)
_READ: dict[Kind, tuple[str, ...]] = {
    "text": (),
    "prompt_completion": _OF_CONVERSATIONS,
    "chat": _OF_CONVERSATIONS,
    "alpaca": (*_OF_CONVERSATIONS, "input", "history"),
    "tokens": ("labels", *MASKS),
}

_PREFERENCE = (
    "it belongs to preference data; train on the better answers with form: prompt_completion, completion_field: chosen "
    "(or form: chat, messages_field: chosen)"
)
_WEIGHT = "every row weighs the same; give sources a weight instead"
_LABEL = "it says whether an answer is a good one, and bad ones would be learned too"
_TOKENS = "the row is tokenised here; form: tokens takes its own tokens"
_PLACES = "there is no conversation that it could belong to; form: chat reads it"
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
    "seq_lengths": "a row is one document; write the documents that were packed into it as rows of their own",
    **dict.fromkeys((*_OF_CONVERSATIONS, "history"), _PLACES),
    "chat_template": "all rows are written by the tokenizer's own",
    **REFUSED,
}
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("weight", "sample_weight", "loss_weight"), lambda value: value == 1),
    # A class is a number or a name, and no matter of the text beside it.
    "label": lambda value: not isinstance(value, bool),
    "position_ids": lambda value: isinstance(value, list) and value == list(range(len(value))),
    # One document.
    "seq_lengths": lambda value: isinstance(value, list) and len(value) == 1,
    "refusal": lambda value: True,
}


def read_columns(kind: Kind, ignore: Collection[str]) -> tuple[str, ...]:
    """The columns that a form reads beside those that it needs, where a row has them."""
    return tuple(column for column in _READ[kind] if column not in ignore)


def check_columns(row: Mapping[str, Any], kind: Kind, fields: Collection[str], ignore: Collection[str]) -> None:
    """Refuse a row that says something in a column that its form cannot honour.

    Args:
        fields: columns that the form needs; they are read whatever they are called.
        ignore: columns that the recipe leaves out.

    Raises:
        MalformedRow: such a column is neither null nor empty.
    """
    for column, value in row.items():
        if column in fields or column in ignore or column in _READ[kind] or column not in _REFUSALS:
            continue
        if value is None or (isinstance(value, str | Sequence | Mapping) and not len(value)):
            continue
        if column in _HARMLESS and _HARMLESS[column](value):
            continue
        raise MalformedRow(
            f"column {column!r} cannot be honoured: {_REFUSALS[column]}; ignore: [{column}] trains without it"
        )
