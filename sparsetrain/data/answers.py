"""Split a pair of a preferred and a rejected answer into two rows with one answer each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsetrain.data.forms import RowForm
from sparsetrain.data.values import MalformedRow, described, value_of

PROMPT = "prompt"
"""Name of a prompt that the row does not name."""


@dataclass(frozen=True)
class Answer:
    """A row with one answer, and how it is read."""

    row: Mapping[str, Any]
    form: RowForm


def answers(row: Mapping[str, Any], form: RowForm) -> tuple[Answer, Answer] | None:
    """The preferred and the rejected answer of a row; None if they are equal.

    The prompt is in a column of its own (text, or turns), or what both answers begin with (TRL's implicit prompt):
    whole turns of conversations, and of plain text the tokens that both begin with, for which the rows have the form
    ``text``.

    Raises:
        MalformedRow: The answers are not both text or both turns, or no prompt is found.
    """
    names = form.fields[:2]
    chosen, rejected = (_turns(value_of(row, name)) for name in names)
    prompt_name = form.fields[2] if form.fields[2:] else None
    prompt = None if prompt_name is None else _turns(value_of(row, prompt_name))
    for name, value in zip(names, (chosen, rejected)):
        if not isinstance(value, str | list):
            raise MalformedRow(f"{name!r} is {described(value)}, not a string and not a list of turns")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise MalformedRow(f"one of {names[0]!r} and {names[1]!r} is text, and the other a list of turns")
    if chosen == rejected:
        return None
    if isinstance(chosen, str) and _is_empty(prompt):
        return _pair(row, names, (chosen, rejected), replace(form, kind="text", fields=()))
    if isinstance(chosen, str) and isinstance(prompt, list):
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    elif isinstance(chosen, list):
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected, form)
    prompt_name = prompt_name or PROMPT
    asked = replace(form, kind="prompt_completion", fields=(prompt_name,))
    return _pair({**row, prompt_name: prompt}, names, (chosen, rejected), asked)


def _pair(
    row: Mapping[str, Any], names: tuple[str, ...], values: tuple[Any, Any], form: RowForm
) -> tuple[Answer, Answer]:
    """Both answers with the form of their rows, whose last field is the answer's."""
    first, second = (
        Answer({**row, name: value}, replace(form, fields=(*form.fields, name))) for name, value in zip(names, values)
    )
    return first, second


def _turns(value: Any) -> Any:
    """A turn by itself (ShareGPT's) as a list of one."""
    if isinstance(value, Mapping):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def _conversation(
    prompt: Any, chosen: list[Any], rejected: list[Any], form: RowForm
) -> tuple[list[Any], list[Any], list[Any]]:
    """The turns of the prompt, and of each answer behind it."""
    names, prompt_name = form.fields[:2], form.fields[-1]
    if isinstance(prompt, list) and prompt:
        return prompt, chosen, rejected
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if _is_empty(prompt):
        if not shared:
            raise MalformedRow(
                f"{names[0]!r} and {names[1]!r} have no first turn in common, which would be the prompt; name the "
                "prompt's column with prompt_field"
            )
    elif not isinstance(prompt, str):
        raise MalformedRow(f"{prompt_name!r} is {described(prompt)}, not a string and not a list of turns")
    elif not shared:
        return [{"role": "user", "content": prompt}], chosen, rejected
    elif not any(prompt.strip() == _content(turn, form).strip() for turn in chosen[:shared]):
        raise MalformedRow(
            f"{prompt_name!r} is none of the turns that {names[0]!r} and {names[1]!r} begin with, so which is the "
            f"prompt cannot be told; ignore: [{prompt_name}] takes those turns"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _is_empty(prompt: Any) -> bool:
    return prompt is None or prompt == [] or (isinstance(prompt, str) and not prompt.strip())


def _content(turn: Any, form: RowForm) -> str:
    named = form.naming.turn(turn, "a turn") if isinstance(turn, Mapping) else {}
    content = named.get("content") or named.get("value")
    return content if isinstance(content, str) else ""
