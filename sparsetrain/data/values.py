"""Read a single value of a row: check presence and type, and remove nulls that come from a table's schema."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sparsetrain.errors import DataError

FIX = "Fix the row: an evaluation leaves none out"
"""What helps where a row of an evaluation cannot be read."""


class MalformedRow(DataError):
    """A row that cannot be rendered, and why.

    Args:
        fault: What is wrong.
        recipe: What the recipe can do about it.
        row: What can be done in the row, where there is no recipe (:attr:`without_recipe`).
    """

    def __init__(self, fault: str, *, recipe: str = "", row: str = "") -> None:
        super().__init__(f"{fault}; {recipe}" if recipe else fault)
        self.without_recipe = f"{fault}; {row}" if row else fault


def fix_or_skip(rows: str) -> str:
    """What helps where ``rows`` of the training data cannot be read; every command says it in these words."""
    return f"Fix {rows}, or set data.on_malformed=skip to train on the others"


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
        raise MalformedRow(f"{name} is not valid Unicode: {problem.reason} at character {problem.start}") from problem
    return value


def value_of(row: Mapping[str, Any], field: str) -> Any:
    """The value in a column.

    Raises:
        MalformedRow: the row has no such column.
    """
    if field not in row:
        raise MalformedRow(f"it has no {field!r}, only {listed(list(row))}")
    return row[field]


def plain(value: Any, name: str) -> Any:
    """``value`` without keys that are null, at every depth; nulls in lists stay.

    A table has the same keys in every row and fills those that a row lacks with nulls, so that a null key and a
    missing one are the same thing here, whatever the file.

    Raises:
        MalformedRow: some text in it is no valid Unicode; ``name`` says where ``value`` stands.
    """
    if isinstance(value, str):
        return text_value(value, name)
    if isinstance(value, Mapping):
        return {
            text_value(key, f"a key of {name}"): plain(item, f"{name}.{key}")
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{place}]") for place, item in enumerate(value)]
    return value


def parsed(value: Any, name: str) -> Any:
    """Parse a value that may be JSON in a string; ``None`` for an empty string.

    Nulls within a JSON string were written intentionally, and stay.

    Raises:
        MalformedRow: the string is not JSON, or some text in the value is no valid Unicode.
    """
    if not isinstance(value, str):
        return plain(value, name)
    if not value.strip():
        return None
    try:
        content = json.loads(value, object_pairs_hook=keyed_once)
    except ValueError as problem:
        raise MalformedRow(f"{name} is not valid JSON: {json_fault(problem)}") from problem
    # For its texts alone: escapes of JSON hide halves of pairs.
    plain(content, name)
    return content


def keyed_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``json.loads``, which keeps the last of several values under one key.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} appears twice")
    return found


def json_fault(problem: ValueError) -> str:
    """The message of ``json.loads``, without Python's advice on numbers with thousands of digits."""
    return "a number of more than 4,300 digits" if "set_int_max_str_digits" in str(problem) else str(problem)


def described(value: Any) -> str:
    """The type of a value, for a message."""
    return "null" if value is None else f"of type {type(value).__name__}"


def listed(columns: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(repr(column) for column in columns) or "no columns"
