"""Turn pydantic's errors into sentences with field, given value, expected value, and a suggested name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from sparsetrain.evaluation.base import TaskSection
from sparsetrain.evaluation.registry import TASKS
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.registry import METHODS, config_or_none
from sparsetrain.nearest import did_you_mean
from sparsetrain.recipe.other_names import other_name
from sparsetrain.recipe.schema import Recipe
from sparsetrain.recipe.task_list import former_section, named
from sparsetrain.recipe.yaml_source import OVERRIDE, KeyPath, Problem, Source, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}

_SWITCHED_OFF = {
    "eval": "eval: {tasks: []} measures nothing",
    "checkpoint": "checkpoint: {every: null} saves only at the end, with export: false no final/ either",
    "wandb": "wandb: {mode: disabled} switches it off",
    "lora": "lora: null trains the weights themselves",
}
"""Hints for sections that users try to switch off with a single word."""
_OFF = (None, False, "off", "no", "none", "None", "false", "disabled")

_DOTTED = re.compile(r"\b[a-z_]+(?:\.[a-z_0-9]{1,64}){1,8}")
_LONGEST_KEY = 64
"""Maximum number of characters of a key that is compared with known keys."""


def explain(errors: list[Any], source: Source) -> list[Problem]:
    """One problem per mistaken field, in the order of the file."""
    found: dict[KeyPath, list[Any]] = {}
    for error in errors:
        found.setdefault(located(error, source.data), []).append(error)
    # A union reports every alternative. Keep the one with the deepest path, which was probably meant.
    around = {path[:length] for path in found for length in range(len(path))}
    paths = [path for path in found if not (path in around and _is_type(found[path]))]
    # Drop errors about other types of a value if it has one valid type and that section refuses it.
    refused = {path: [error for error in found[path] if error["type"] == "value_error"] for path in paths}
    return [_problem(path, refused[path] or found[path], source) for path in paths]


def _problem(path: KeyPath, errors: list[Any], source: Source) -> Problem:
    text = _describe(path, errors, source.data)
    place = source.place(path)
    if errors[0]["type"] == "value_error":
        # A section's validator names fields only in its text. Prefer one that the command line changed.
        named = [(*path, word) for word in re.findall(r"\w+", text) if (*path, word) in source.places]
        places = [source.place(each) for each in named] or [place]
        place = next((each for each in places if each.startswith(OVERRIDE)), places[0])
    return Problem(place, path, text)


def elsewhere(text: str, places: Mapping[KeyPath, str], known: Collection[str]) -> str:
    """The places of the settings that a message names, each in brackets, except files and places in ``known``."""
    found = {}
    for name in _DOTTED.findall(text):
        place = places.get(tuple(int(part) if part.isdecimal() else part for part in name.split(".")))
        if place is not None and place not in known and place.rpartition(":")[0] not in known and place not in text:
            found[name] = place
    return "".join(f" ({name}: {place})" for name, place in found.items())


def located(error: Any, data: Any) -> KeyPath:
    """The path of an error in the recipe, without pydantic's names for alternatives of unions."""
    path: list[str | int] = []
    location = error["loc"]
    for position, part in enumerate(location):
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside:
            data = data[part]
        elif not (error["type"] == "missing" and position == len(location) - 1):
            continue
        path.append(part)
    if error["type"] == "union_tag_invalid":
        path.append(error["ctx"]["discriminator"].strip("'"))
    elif error["type"] == "section_unusable":
        path.append(error["ctx"]["key"])
    return tuple(path)


def _is_type(errors: list[Any]) -> bool:
    return all(error["type"].endswith("_type") for error in errors)


def _describe(path: KeyPath, errors: list[Any], data: Any) -> str:
    error = errors[0]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, data)
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(context["error"])
    if kind == "section_unusable":
        return str(context["fault"]).removeprefix("attention.")
    if kind == "union_tag_not_found":
        return f"needs {context['discriminator']}"
    if kind == "union_tag_invalid":
        choices = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        return f"there is no {_show(context['tag'])}{_choose(str(context['tag']), choices)}"
    for part in path:
        data = data[part]
    expected = " or ".join(dict.fromkeys(_expectation(each) for each in errors))
    return f"expected {expected}, got {_show(data)}{_guess(error, data) or _instead(path, error, data)}"


def _expectation(error: Any) -> str:
    template = _EXPECTED.get(error["type"])
    return template.format(**error.get("ctx", {})) if template else str(error["msg"])


def _guess(error: Any, value: Any) -> str:
    if error["type"] == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if error["type"] in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return "; without quotes, if it has them" if value.strip()[:1].isdigit() or value in ("true", "false") else ""
    if error["type"] == "literal_error" and isinstance(value, str):
        choices = [choice for choice in error["ctx"]["expected"].split("'") if choice.isidentifier()]
        return did_you_mean(value, choices)
    return ""


def _instead(path: KeyPath, error: Any, value: Any) -> str:
    if len(path) == 1 and path[0] in _SWITCHED_OFF and _is_type([error]) and value in _OFF:
        return f"; {_SWITCHED_OFF[str(path[0])]}"
    if path == ("train", "optimizer") and isinstance(value, str):
        return f"; train.optimizer.name={value:.{_LONGEST_KEY}} chooses one"
    return ""


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        keys = ", ".join(map(str, list(value)[:8])) + (", ..." if len(value) > 8 else "")
        return f"a mapping ({keys[:200] or 'empty'})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text):,} characters)"


def _unknown_key(path: KeyPath, data: Any) -> str:
    key = str(path[-1])
    if path[:-1] == ("eval",) and key in TASKS:
        return former_section(key, data["eval"][key])
    section = section_at(path[:-1], data)
    known = list(section.model_fields) if section else []
    owners = [name for name, config in METHODS.items() if key in config.model_fields] if path[0] == "attention" else []
    if owners and len(path) == 2:
        names = " and ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
        having = f"{names} {'has' if len(owners) == 1 else 'have'}"
        return f"unknown key: method {data['attention']['method']} has no {key}, but {having}"
    ours = other_name(path)
    if ours is not None:
        return f"unknown key; did you mean {ours}?"
    others = [other for other in _short_paths() if other[-1] == key]
    if others:
        return f"unknown key here; did you mean {' or '.join(dotted(other) for other in others)}?"
    having = f"; {dotted(path[:-1]) or 'a recipe'} has {', '.join(known)}"
    return "unknown key" + did_you_mean(
        key, known, otherwise=having, write=lambda near: dotted(named((*path[:-1], near), data))
    )


@cache
def _short_paths() -> tuple[tuple[str, ...], ...]:
    return tuple(path for path in field_paths(Recipe) if len(path) <= 2)


def _choose(given: str, choices: list[str]) -> str:
    return did_you_mean(given, choices, otherwise=f"; choose from {', '.join(choices)}")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section classes in a field's type: ``list[DataSource] | None`` contains ``DataSource``."""
    if annotation is MethodConfig:
        yield from METHODS.values()
    elif annotation is TaskSection:
        yield from TASKS.usable()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def section_at(path: KeyPath, data: Any) -> type[BaseModel] | None:
    """The section class of the mapping at ``path`` of a recipe; None inside free-form mappings."""
    section: type[BaseModel] | None = Recipe
    choices: list[type[BaseModel]] = [Recipe]
    for part in path:
        data = data[part]
        if not isinstance(part, int):
            field = section.model_fields.get(part) if section else None
            choices = list(sections_in(field.annotation)) if field else []
            if field is not None and field.annotation is MethodConfig:
                config = config_or_none(data.get("method")) if isinstance(data, dict) else None
                choices = [] if config is None else [config]
        elif isinstance(data, dict) and any(issubclass(choice, TaskSection) for choice in choices):
            choices = [*TASKS.usable([data.get("task")])]
        section = choices[0] if choices else None
    return section


def field_paths(section: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field below a section as a path of keys."""
    for name, field in section.model_fields.items():
        yield (*above, name)
        for inner in sections_in(field.annotation):
            yield from field_paths(inner, (*above, name))
