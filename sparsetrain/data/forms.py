"""Determine the form of a source's rows from its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sparsetrain.data.conversation import NO_NAMES, REASONING, REFUSED
from sparsetrain.data.form_advice import ANSWERS, QUESTIONS, advice
from sparsetrain.data.known_columns import INPUTS, MASKS, OF_CONVERSATIONS, Kind, read_columns
from sparsetrain.data.loss_keys import DETAILS, SWITCHES, UNCLEAR
from sparsetrain.data.naming import Naming
from sparsetrain.data.values import listed
from sparsetrain.errors import DataError
from sparsetrain.nearest import did_you_mean
from sparsetrain.recipe.chat_templates import shipped_templates

if TYPE_CHECKING:
    from sparsetrain.source_section import DataSource

_FIELD_SETTINGS: dict[Kind, str] = {
    "text": "text_field",
    "prompt_completion": "prompt_field and completion_field",
    "chat": "messages_field",
    "alpaca": "form",
    "tokens": "form",
    "preference": "chosen_field and rejected_field",
}
_FORM_OF_FIELD: dict[str, Kind] = {
    "text_field": "text",
    "prompt_field": "prompt_completion",
    "completion_field": "prompt_completion",
    "separator": "prompt_completion",
    "messages_field": "chat",
}
CONVERSATIONS = ("conversations", "conversation")
"""Columns of turns that ``auto`` knows beside ``messages_field``."""
MEANINGS = (
    *("messages", "prompt", "completion", "chosen", "rejected", *QUESTIONS, *ANSWERS, "text", "input_ids", "labels"),
    *(*OF_CONVERSATIONS, *INPUTS, "history", *MASKS),
)
"""What ``columns`` of a source can say that a column is."""
_KEYS_OF_TURNS = (*REASONING, *REFUSED, *SWITCHES, *DETAILS, UNCLEAR, "name", "id", "tool_call_id", "tool_calls")


@dataclass(frozen=True)
class RowForm:
    """The form of a source: which columns are read, and how they become tokens."""

    kind: Kind
    fields: tuple[str, ...]
    """The columns needed, in the order the kind needs them."""
    optional: tuple[str, ...] = ()
    """Other columns that are read if a row has them, even if the first row does not."""
    seen: tuple[str, ...] = ()
    """The optional columns that the source is known to have."""
    unread: tuple[str, ...] = ()
    """The source's other columns."""
    contrary: tuple[str, ...] = ()
    """Columns that would have selected another form if the first row had them."""
    ignore: tuple[str, ...] = ()
    """Columns and keys of turns that the recipe ignores."""
    separator: str = ""
    """The text between a prompt and its completion."""
    naming: Naming = NO_NAMES
    """The source's own names of columns, keys and roles."""

    def describe(self) -> str:
        """The form and its columns in a line."""
        parts = [f"{self.kind.replace('_', ' + ')} from {listed((*self.fields, *self.seen))}"]
        if self.separator:
            parts.append(f"joined with {self.separator!r}")
        parts += [f"{theirs!r} as {ours!r}" for theirs, ours in self.naming.columns]
        if self.unread:
            parts.append(f"not read: {listed(self.unread)}")
        return ", ".join(parts)


class HasChatTemplate(Protocol):
    """The part of a tokenizer that is used here."""

    @property
    def chat_template(self) -> Any:
        """The template, or several by name; None without one."""


def resolve_form(
    source: DataSource, columns: Sequence[str], tokenizer: HasChatTemplate, *, pairs: bool = False
) -> RowForm:
    """The form of a source with these columns.

    ``auto`` takes the form whose column the recipe names, else the first that fits of chat messages (also ShareGPT's
    ``conversations``), prompt + completion, Alpaca's ``instruction`` + ``output`` (or another question and its answer),
    text, and tokens.

    Args:
        pairs: rows are pairs of a preferred and a rejected answer; without it such rows are refused.

    Raises:
        DataError: a column is missing, no form fits, chat is asked of a tokenizer without a chat template, or a setting
            has no effect on this form.
    """
    naming = Naming.of(source)
    columns = _renamed(source, columns, naming)
    kind, fields = _pair_and_fields(source, columns) if pairs else _kind_and_fields(source, columns)
    _check_turn_names(source, kind)
    missing = [field for field in fields if field not in columns]
    if missing:
        hint = did_you_mean(missing[0], columns, " ({})", write=repr)
        raise DataError(
            f"data source {source.label!r}: form {kind} needs a column {missing[0]!r}{hint}; "
            f"it has {listed(columns)}. Name the column with {_FIELD_SETTINGS[kind]}"
        )
    _check_ignored(source, columns, fields)
    if kind == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"data source {source.label!r} holds chat messages, but the tokenizer has no chat template; set "
            f"model.chat_template ({', '.join(shipped_templates())}, or a file), or train on form text or "
            "prompt_completion"
        )
    optional = read_columns(kind, source.ignore)
    seen = tuple(column for column in optional if column in columns)
    read = {*fields, *seen}
    unread = tuple(column for column in columns if column not in read)
    contrary = tuple(column for column in _contrary(source, kind) if column not in (*columns, *fields, *source.ignore))
    return RowForm(kind, fields, optional, seen, unread, contrary, tuple(source.ignore), source.separator, naming)


def _renamed(source: DataSource, columns: Sequence[str], naming: Naming) -> list[str]:
    """The columns under our names."""
    for theirs, ours in naming.columns:
        if ours not in MEANINGS:
            hint = did_you_mean(ours, MEANINGS, " ({})")
            raise DataError(
                f"data source {source.label!r}: columns names {ours!r}, which has no meaning here{hint}; on the left "
                f"stands one of {', '.join(MEANINGS)}, on the right a column of the data"
            )
        if theirs not in columns:
            hint = did_you_mean(theirs, columns, " ({})", write=repr)
            raise DataError(
                f"data source {source.label!r}: columns says that {ours} is in {theirs!r}{hint}; "
                f"it has {listed(columns)}"
            )
    names = dict(naming.columns)
    renamed = [names.get(column, column) for column in columns]
    if twice := [name for name in names.values() if renamed.count(name) > 1]:
        raise DataError(
            f"data source {source.label!r}: columns gives the name {twice[0]!r} to {source.columns[twice[0]]!r}, and "
            "another column has it; give that one another name too"
        )
    return renamed


def _check_turn_names(source: DataSource, kind: Kind) -> None:
    for setting in ("turn_keys", "roles"):
        if getattr(source, setting) and kind not in ("chat", "prompt_completion", "preference"):
            raise DataError(f"data source {source.label!r}: {setting} has no effect on form {kind}, which has no turns")


def _check_ignored(source: DataSource, columns: Sequence[str], fields: Sequence[str]) -> None:
    for name in source.ignore:
        if name in fields:
            raise DataError(f"data source {source.label!r}: ignore names {name!r}, which its form reads")
        if name not in columns and name not in _KEYS_OF_TURNS:
            raise DataError(
                f"data source {source.label!r}: ignore names {name!r}, which is none of its columns "
                f"({listed(columns)}) and no key of a turn that is read"
            )


def _pair_and_fields(source: DataSource, columns: Sequence[str]) -> tuple[Kind, tuple[str, ...]]:
    """The columns of both answers, and of the prompt where there is one."""
    if source.form not in ("auto", "preference"):
        raise DataError(
            f"data source {source.label!r}: form: {source.form} gives one document a row, and preference learns from "
            "pairs of answers; set form: preference, or leave the preference section out"
        )
    prompt = _is_set(source, "prompt_field") or source.prompt_field in columns
    asked = (source.prompt_field,) if prompt and source.prompt_field not in source.ignore else ()
    return "preference", (source.chosen_field, source.rejected_field, *asked)


def _kind_and_fields(source: DataSource, columns: Sequence[str]) -> tuple[Kind, tuple[str, ...]]:
    pair = (source.prompt_field, source.completion_field)
    fields: dict[Kind, tuple[str, ...]] = {
        "text": (source.text_field,),
        "prompt_completion": pair,
        "chat": (source.messages_field,),
        "tokens": ("input_ids",),
    }
    if source.form == "preference":
        raise DataError(f"data source {source.label!r}: form: preference needs the recipe's preference section")
    if source.form != "auto":
        return source.form, fields[source.form]
    named = {name: kind for name, kind in _FORM_OF_FIELD.items() if _is_set(source, name)}
    if len(set(named.values())) > 1:
        raise DataError(
            f"data source {source.label!r}: {' and '.join(named)} belong to different forms; set form to say which"
        )
    if named:
        kind = next(iter(named.values()))
        return kind, fields[kind]
    for turns in (source.messages_field, *CONVERSATIONS):
        if turns in columns:
            return "chat", (turns,)
    if all(field in columns for field in pair):
        return "prompt_completion", pair
    if asked := _question_and_answer(source, columns):
        return "alpaca", asked
    if source.text_field in columns:
        return "text", (source.text_field,)
    if "input_ids" in columns:
        return "tokens", ("input_ids",)
    if "chosen" in columns:
        better = (
            "form: prompt_completion and completion_field: chosen (or form: chat and messages_field: chosen)"
            if "prompt" in columns
            else "form: chat and messages_field: chosen (or form: text and text_field: chosen, where it is text)"
        )
        raise DataError(
            f"data source {source.label!r} holds preference data (chosen, rejected); to learn from both answers, give "
            f"the recipe a preference section; to train on the better answers, set {better}, and ignore: [rejected]"
        )
    raise DataError(f"data source {source.label!r}: its columns {listed(columns)} fit no known form{advice(columns)}")


def _question_and_answer(source: DataSource, columns: Sequence[str]) -> tuple[str, str] | None:
    """The columns of a question and of its answer, where there is one of each.

    Raises:
        DataError: there are several of one kind.
    """
    left = [column for column in columns if column not in source.ignore]
    if {"instruction", "output"} <= set(left):
        return "instruction", "output"
    asked, answered = ([column for column in left if column in names] for names in (QUESTIONS, ANSWERS))
    if not asked or not answered:
        return None
    for found in (asked, answered):
        if len(found) > 1:
            raise DataError(
                f"data source {source.label!r} has several columns that may be the "
                f"{'question' if found is asked else 'answer'}: {listed(found)}; leave out those that are not meant "
                f"by ignore, such as ignore: [{', '.join(found[1:])}]"
            )
    return asked[0], answered[0]


def _contrary(source: DataSource, kind: Kind) -> list[str]:
    """The columns that ``auto`` prefers to those of a form; empty if the recipe names the form or columns."""
    if source.form != "auto" or any(_is_set(source, name) for name in _FORM_OF_FIELD):
        return []
    if kind == "preference":
        return [source.prompt_field]
    decisive: dict[Kind, tuple[str, ...]] = {
        "chat": (source.messages_field, *CONVERSATIONS),
        "prompt_completion": (source.completion_field,),
        "alpaca": ("instruction",),
        "text": (source.text_field,),
        "tokens": (),
    }
    order = list(decisive)
    return [column for earlier in order[: order.index(kind)] for column in decisive[earlier]]


def _is_set(source: DataSource, name: str) -> bool:
    return getattr(source, name) != type(source).model_fields[name].default


def takes_template(form: RowForm, row: Mapping[str, Any], tokenizer: HasChatTemplate) -> bool:
    """Whether rows such as this one go through the chat template."""
    turns = form.kind in ("prompt_completion", "preference") and not isinstance(
        form.naming.row(row).get(form.fields[0]), str
    )
    return form.kind == "chat" or (bool(tokenizer.chat_template) and (form.kind == "alpaca" or turns))
