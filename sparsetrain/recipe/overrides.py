"""Command line overrides: ``train.lr=2e-5``, ``data.sources.0.path=corpus.jsonl``, ``attention.method=full``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import task_list
from sparsetrain.recipe.layers import Layer, drop_conflicts
from sparsetrain.recipe.yaml_source import DEEPEST, OVERRIDE, KeyPath, Source, dotted, parse_yaml, text_fault

LONGEST_INDEX = 6
"""Maximum number of digits of a list index."""

SHOWN = 100
"""Maximum number of characters of an override that an error repeats."""


def apply_overrides(source: Source, overrides: Sequence[str], output: str | None = None) -> list[str]:
    """Apply ``key=value`` overrides to a recipe, in place.

    Args:
        output: The run folder of ``--output``: a plain path, not YAML.

    Returns:
        Notes on other settings that they replaced.

    Raises:
        RecipeError: An override is not ``key=value``, or its path goes through a value that is not a section.
    """
    parsed = [_parse(text) for text in overrides]
    if output is not None:
        place = f"--output {_shown(output)}"
        fault = "is empty; name a folder" if not output else text_fault(output)
        if fault is not None:
            raise RecipeError(f"{place}: {fault}")
        parsed.append((("output",), Source(output, {(): place})))
    notes = drop_conflicts(source, _layer([(task_list.located(path, source.data), value) for path, value in parsed]))
    former: dict[KeyPath, str] = {}
    given = [path for path, _ in parsed]
    removed: list[KeyPath] = []
    for path, value in parsed:
        real = tuple(_index(part) for part in task_list.completed(path, value, given, source))
        place = value.place(())
        if real[:-1] == task_list.TASK_LIST and value.data is None and not value.unreadable:
            if isinstance(real[-1], str):
                continue
            if real[-1] < len(task_list.task_entries(source.data)):
                removed.append(real)
        _set(source, tuple(str(part) for part in real), value)
        if real in former:
            notes.append(f"{place} replaces {former[real]}")
        former[real] = place
    task_list.without_removed(source, removed)
    return notes


def _parse(text: str) -> tuple[KeyPath, Source]:
    place = f"{OVERRIDE} {_shown(text)}"
    key, equals, value = text.partition("=")
    path: KeyPath = tuple(key.split("."))
    if not equals or not all(path):
        raise RecipeError(f"{place}: expected key=value, such as train.lr=2e-5")
    if key == "base":
        raise RecipeError(f"{place}: base belongs in a file; write a recipe with this base, or copy it")
    instead = task_list.former_override(path, text)
    if instead is not None:
        raise RecipeError(f"{place}: {instead}")
    fault = f"leads deeper than {DEEPEST} sections" if len(path) > DEEPEST else text_fault(key)
    if fault is not None:
        raise RecipeError(f"{place}: {fault}")
    return path, parse_yaml(value, place, number_lines=False)


def _layer(parsed: Sequence[tuple[KeyPath, Source]]) -> Layer:
    """The layer of all overrides of a command line; of two for one path the later counts."""
    given = {tuple(_index(part) for part in path): value for path, value in parsed}
    inside: dict[KeyPath, dict[KeyPath, Source]] = {}
    for path, value in given.items():
        for length in range(len(path) + 1):
            inside.setdefault(path[:length], {})[path[length:]] = value

    def get(path: KeyPath) -> Any:
        found = inside.get(path, {})
        return found[()].data if () in found else {dotted(rest): value.data for rest, value in found.items()} or None

    def place(path: KeyPath) -> str:
        return next((value.place(()) for value in inside.get(path, {}).values()), OVERRIDE)

    return Layer(get, lambda path: path in inside, place)


def _index(part: str | int) -> str | int:
    """Convert a component of a path to an integer if it is a list index."""
    text = str(part)
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LONGEST_INDEX else part


def _set(source: Source, path: KeyPath, value: Source) -> None:
    """Set an override's value in the tree, creating missing sections."""
    place = value.places[()]
    container: Any = source.data
    real: KeyPath = ()
    for position, part in enumerate(path):
        key: str | int = part
        if isinstance(container, list):
            key = _index(part)
            if not isinstance(key, int) or key >= len(container):
                raise RecipeError(
                    f"{place}: {dotted(real)} is a list of {len(container)}; name an entry by its number, from 0"
                )
        elif not isinstance(container, dict):
            raise RecipeError(f"{place}: {dotted(real)} is {_shown(repr(container))}, which has no settings inside")
        real = (*real, key)
        if position < len(path) - 1:
            if isinstance(container, dict) and container.get(str(key)) is None:
                source.forget(real, None)
                container[str(key)] = {}
                source.places[real] = place
            container = container[key]
    old = container.get(key) if isinstance(container, dict) else container[int(key)]
    source.forget(real, old)
    container[key] = value.data
    source.places.update({(*real, *inner): where for inner, where in value.places.items()})
    source.problems += [replace(problem, path=(*real, *problem.path)) for problem in value.problems]
    source.unreadable.update(
        {(*real, *inner): replace(problem, path=(*real, *inner)) for inner, problem in value.unreadable.items()}
    )


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
