"""The turns of a conversation, from any of the formats that write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsetrain.data.values import MalformedRow, described, text_value, value_of

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's names for the roles of a conversation."""


def messages_of(row: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """The turns in a column, as ``{role, content}``.

    Raises:
        MalformedRow: it holds no list of turns, or one of them has no known role or no content.
    """
    turns = value_of(row, field)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise MalformedRow(f"{field!r} is {described(turns)}, not a list of turns")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, number: int) -> dict[str, Any]:
    """``{role, content}``, from that or from ShareGPT's ``{from, value}``."""
    if not isinstance(turn, Mapping):
        raise MalformedRow(f"turn {number} is {described(turn)}, not a mapping with role and content")
    present = {key: value for key, value in turn.items() if value is not None}
    role = present.pop("role", None) or present.pop("from", None)
    content = present.pop("content", None) if "content" in present else present.pop("value", None)
    if not isinstance(role, str):
        raise MalformedRow(f"turn {number} has no role")
    role = ROLES.get(role, role)
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise MalformedRow(f"turn {number} has the unknown role {role!r}")
    return {**present, "role": role, "content": text_value(content, f"the content of turn {number}")}
