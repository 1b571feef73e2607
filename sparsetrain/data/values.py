"""One value of a row: there, and of the right type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class MalformedRow(ValueError):
    """A row that cannot be rendered, and why."""


def string(row: Mapping[str, Any], field: str) -> str:
    """The text in a column.

    Raises:
        MalformedRow: the column is missing, or holds no valid text.
    """
    return text_value(value_of(row, field), repr(field))


def text_value(value: Any, name: str) -> str:
    """``value``, if it is text that can be encoded.

    Raises:
        MalformedRow: it is not; ``name`` says where it stands.
    """
    if not isinstance(value, str):
        raise MalformedRow(f"{name} is {described(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        raise MalformedRow(f"{name} is no valid Unicode: {problem.reason} at character {problem.start}") from problem
    return value


def value_of(row: Mapping[str, Any], field: str) -> Any:
    """The value in a column.

    Raises:
        MalformedRow: the row has no such column.
    """
    if field not in row:
        raise MalformedRow(f"it has no {field!r}, only {listed(list(row))}")
    return row[field]


def described(value: Any) -> str:
    """What a value is, for a message."""
    return "null" if value is None else f"of type {type(value).__name__}"


def listed(columns: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(repr(column) for column in columns) or "no columns"
