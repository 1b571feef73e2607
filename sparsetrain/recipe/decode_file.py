"""A decode section as a file, such as ``sparsetrain calibrate`` writes. It does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.errors import ModelError
from sparsetrain.generation.settings import PUBLISHED, Decode, parse_decode
from sparsetrain.recipe.yaml_source import dump_yaml, parse_yaml
from sparsetrain.textfile import read_text

FILES = (".yaml", ".yml", ".json")
"""Endings of files that hold a section."""


def read_decode(given: str | Path | Mapping[str, Any] | Decode) -> Decode:
    """A decode section, also from a file of ``sparsetrain calibrate`` or of one's own.

    Raises:
        ModelError: a field is wrong, or the name or file is not known; the message names it.
        RecipeError: the file is no YAML.
    """
    if not isinstance(given, str | Path) or str(given) in PUBLISHED or Path(given).suffix not in FILES:
        return parse_decode(str(given) if isinstance(given, Path) else given)
    place = f"decode={given}"
    values = parse_yaml(read_text(given, place, ModelError), str(given)).data
    if not isinstance(values, dict):
        raise ModelError(f"{place}: expected the fields of a decode section, such as prune: {{p: 0.9}}")
    try:
        return parse_decode(values)
    except ModelError as error:
        raise ModelError(f"{given}: {error}") from None


def decode_text(decode: Decode) -> str:
    """The section as the text of a file that :func:`read_decode` reads."""
    return dump_yaml(decode.model_dump(mode="json", exclude_none=True))
