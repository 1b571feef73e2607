"""What of a run is published: without the folders of the machine that ran it."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePath
from typing import Any

from sparsetrain.modeling.places import ADAPTER_FILE
from sparsetrain.modeling.records import RECORD_FILE
from sparsetrain.recipe import Recipe

STAND_IN = "/path/to"
"""The folder in place of one of this machine."""
OF_PLACES = ("path", "tokenizer")
"""Fields whose value may be the name of a folder beside the working directory."""


def lies_here(value: str, field: str = "path") -> bool:
    """Whether a setting is a file or folder of this machine, existing or not, and neither a Hub id nor a name."""
    if value.startswith(("/", "~", "./", "../")) or value in (".", ".."):
        return True
    return ("/" in value or field in OF_PLACES) and (os.path.exists(value) or value.count("/") > 1)


def stand_in(value: str) -> str:
    """A place of this machine without its folders."""
    return f"{STAND_IN}/{PurePath(value).name}" if PurePath(value).name else STAND_IN


def public_recipe(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a recipe without ``output``, with places of this machine replaced; and what replaces each."""
    replaced: dict[str, str] = {}

    def cleaned(value: Any, field: str) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(below, str(key)) for key, below in value.items()}
        if isinstance(value, list):
            return [cleaned(below, field) for below in value]
        if isinstance(value, str) and lies_here(value, field):
            replaced[value] = stand_in(value)
            return replaced[value]
        return value

    settings = recipe.model_dump(mode="json", exclude={"output"})
    return {key: cleaned(value, key) for key, value in settings.items()}, replaced


def without_places(text: str, replaced: dict[str, str]) -> str:
    """A text in which the places that a recipe names, as it writes them or whole, are replaced."""
    whole = {os.path.realpath(os.path.expanduser(place)): instead for place, instead in replaced.items()}
    known = {**whole, **{place: instead for place, instead in replaced.items() if "/" in place}}
    for place in sorted(known, key=len, reverse=True):
        text = text.replace(place, known[place])
    return text


def name_base(folder: Path, base: str | None) -> None:
    """Record another base in a folder to publish, and no folder of this machine that is not needed to load it.

    Args:
        base: A Hub id or folder; None leaves the base of adapters as it is.
    """
    file, adapter_file = folder / RECORD_FILE, folder / ADAPTER_FILE
    record = json.loads(file.read_bytes())
    if adapter_file.is_file():
        config = json.loads(adapter_file.read_bytes())
        if base is not None:
            base = str(Path(base).resolve()) if os.path.isdir(base) else base
            record["base"] = record["model"]["path"] = config["base_model_name_or_path"] = base
            record["model"]["revision"] = None
        # The tokenizer lies beside the adapters, with its chat template.
        record["model"] |= {"tokenizer": None, "chat_template": None}
        adapter_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    elif lies_here(str(record["base"])):
        record["base"] = PurePath(record["base"]).name
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
