"""Settings of generation as text: those of decoding, as in ``twilight,prune.p=0.9``, and a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.generation.settings import Decode, parse_decode

NONE = "none"
"""No section: all keys are read."""


def split_setting(flag: str, text: str) -> tuple[str | None, dict[str, str]]:
    """A setting with fields behind it, as in ``twilight,prune.p=0.9``: its name or file, and the fields.

    Raises:
        RecipeError: a part is no field, or a field is there twice.
    """
    # Commas inside of brackets belong to a list.
    first, *rest = re.split(r",(?![^\[]*\])", text)
    name, parts = (None, [first, *rest]) if "=" in first and not Path(first).is_file() else (first, rest)
    fields: dict[str, str] = {}
    for part in parts:
        field, equals, value = part.strip().partition("=")
        if not equals:
            raise RecipeError(f"{flag} {text}: {part} is no field; write a setting, then fields such as prune.p=0.9")
        if field in fields:
            raise RecipeError(f"{flag} {text}: {field} is there twice; give it once")
        fields[field] = value
    return name, fields


def read_value(field: str, text: str) -> Any:
    """The value of a field, which messages call so: ``--decode.prune.p``.

    Raises:
        ModelError: it is none.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelError(f"{field} {text} is no value such as 0.9, 8, quest or [0, 1]") from error


def decode_section(
    published: str | None, given: Mapping[str, str], read: Callable[[str], Decode] = parse_decode
) -> dict[str, Any] | None:
    """The fields that were given, laid over published settings; empty for no section, None for no option.

    Args:
        read: reads what ``published`` names; a command reads files as well.
    """
    section: dict[str, Any] = {}
    if published == NONE:
        if given:
            flag = f"--decode.{next(iter(given))}"
            raise ModelError(f"--decode {NONE} reads all keys, so {flag} would have no effect; drop one")
        return section
    if published is not None:
        section = read(published).model_dump(mode="json")
    for name, text in given.items():
        value = read_value(f"--decode.{name}", text)
        part, _, inner = name.rpartition(".")
        place = section if not part else section.get(part) or {}
        if part:
            section[part] = place
        place[inner] = value
    return section or None


def parse_budget(given: int | str) -> int | None:
    """The tokens of a budget; None for ``auto``.

    Raises:
        ModelError: it is neither ``auto`` nor a number of at least 1.
    """
    if given == "auto":
        return None
    tokens = int(given) if isinstance(given, str) and given.isascii() and given.isdigit() else given
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ModelError(f"budget={given} must be auto, or a number of tokens of at least 1")
    return tokens
