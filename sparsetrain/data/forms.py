"""Which form the rows of a source have, by its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sparsetrain.data.values import listed
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from sparsetrain.recipe.schema import DataSource


@dataclass(frozen=True)
class RowForm:
    """How the rows of one source become tokens."""

    kind: Literal["text", "prompt_completion", "chat", "alpaca"]
    fields: tuple[str, ...]
    """The columns read, in the order the kind needs them."""


class HasChatTemplate(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def chat_template(self) -> Any:
        """The template, or several by name; None without one."""


def resolve_form(source: DataSource, columns: Sequence[str], tokenizer: HasChatTemplate) -> RowForm:
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
            f"it has {listed(columns)}. Name the column with {_FIELD_SETTINGS[kind]}"
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
        f"data source {source.label!r}: its columns {listed(columns)} fit no known form{hint}. Set form, and "
        "text_field, prompt_field and completion_field, or messages_field, to say how a row becomes tokens"
    )
