"""Load a :class:`Recipe` from a file and overrides: inheritance, environment variables, overrides, validation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sparsetrain.counted import counted
from sparsetrain.errors import RecipeError, SparsetrainError
from sparsetrain.nearest import did_you_mean
from sparsetrain.recipe import problems, task_list
from sparsetrain.recipe.adapters_start import begin_with_adapters
from sparsetrain.recipe.consistency import contradictions, without_effect
from sparsetrain.recipe.layers import Layer, drop_conflicts
from sparsetrain.recipe.overrides import apply_overrides
from sparsetrain.recipe.schema import SCHEMA_VERSION, Recipe
from sparsetrain.recipe.shipped import LONGEST_NAME, find_recipe, recipes_folder, shipped_recipes
from sparsetrain.recipe.yaml_source import LARGEST, KeyPath, Problem, Source, dump_yaml, parse_yaml, text_fault
from sparsetrain.section import Section
from sparsetrain.textfile import read_text

Valid = TypeVar("Valid", bound=Section)

LARGEST_FILE = 2**18
"""Maximum bytes of a recipe; the longest shipped one has three thousand."""

MOST_BASES = 16
"""Maximum number of recipes in a chain of bases."""

DATA = (".jsonl", ".parquet", ".arrow", ".txt", ".csv")
"""Endings of data files, which new users give in place of a recipe."""

SHOWN = 20
"""Maximum number of problems that are listed; for more, the number is given."""

NOT_INHERITED = ("name", "output")
"""Settings that a recipe does not inherit from its base: two runs must not share a name or a folder."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, its file, and notes for the user."""

    recipe: Recipe
    path: Path
    notes: list[str]
    """Settings that were replaced or have no effect, one sentence each. Print them."""
    places: dict[KeyPath, str]
    """Where each setting is set: file and line of this recipe or of a base, or the override."""

    @property
    def resolved(self) -> dict[str, Any]:
        """The complete recipe, including defaults, as plain values."""
        return self.recipe.model_dump(mode="json")

    @contextmanager
    def naming_places(self) -> Iterator[None]:
        """Add to an error the places of the settings that it names, if they are not in the recipe's own file."""
        try:
            yield
        except SparsetrainError as error:
            error.args = (f"{error}{problems.elsewhere(str(error), self.places, (str(self.path),))}",)
            raise


def load_recipe(path: str | Path, overrides: Sequence[str] = (), output: str | None = None) -> LoadedRecipe:
    """Read, merge and validate a recipe.

    Args:
        path: A YAML file, or the name of a shipped recipe such as ``quickstart``.
        overrides: ``key=value`` settings merged over the file: ``train.lr=2e-5``, ``data.sources.0.path=corpus.jsonl``,
            ``eval.tasks.passkey.lengths=[512,1024]``. Values are YAML and are validated like the file's. They replace
            conflicting settings as a file does over its base (:mod:`sparsetrain.recipe.layers`).
        output: The run folder, instead of the recipe's; a plain path, not YAML.

    Raises:
        RecipeError: Lists every mistake of the recipe, one line each, with the file and line or the override.
    """
    file = find_recipe(path)
    notes: list[str] = []
    source = _read_with_bases(file, notes, ())
    notes += apply_overrides(source, overrides, output)
    notes += begin_with_adapters(source)
    _refuse_newer(source)
    fault = text_fault(file.stem) or ("holds ${" if "${" in file.stem else None)
    if fault is not None and not source.data.get("name"):
        raise RecipeError(f"{str(file)!r:.300}: the name of the file {fault}; rename it, or give the recipe a name")
    source.data["name"] = source.data.get("name") or file.stem
    source.data["output"] = source.data.get("output") or f"runs/{source.data['name']}"
    recipe = _validate(source, file)
    return LoadedRecipe(recipe, file, notes + without_effect(recipe), task_list.named_places(source))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with all its defaults as YAML, which :func:`load_recipe` reads back as an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read(file: Path) -> Source:
    called = _called(file)
    as_source = f"; to read data, name it in a recipe: data.sources=[{{path: {file}}}]"
    if file.suffix in DATA:
        raise RecipeError(f"{called}: a recipe is a YAML file, not {file.suffix}{as_source}")
    source = parse_yaml(read_text(file, called, RecipeError, LARGEST_FILE), called)
    if source.data is None:
        raise RecipeError(f"{called}: is empty; start from `sparsetrain recipe copy quickstart`")
    if not isinstance(source.data, dict):
        raise RecipeError(
            f"{called}: a recipe is a mapping of sections (model:, attention:, data:, ...), "
            f"not a {type(source.data).__name__}{as_source if file.suffix == '.json' else ''}"
        )
    _refuse_newer(source)
    return source


def _called(file: Path) -> str:
    """The name of a recipe in errors: its path, or its name if it ships with the package."""
    folder = recipes_folder()
    return f"shipped recipe {file.relative_to(folder)}" if file.is_relative_to(folder) else str(file)


def _refuse_newer(source: Source) -> None:
    version = source.data.get("version")
    if isinstance(version, int | float) and version > SCHEMA_VERSION:
        raise RecipeError(
            f"{source.place(('version',))}: the recipe is written for schema version {version}, and this sparsetrain "
            f"reads versions up to {SCHEMA_VERSION}; upgrade it: pip install --upgrade sparsetrain"
        )


def _read_with_bases(file: Path, notes: list[str], children: tuple[Path, ...]) -> Source:
    if file.resolve() in children:
        chain = " -> ".join(path.name for path in (*children, file))
        raise RecipeError(f"{file}: base recipes form a cycle: {chain}")
    if len(children) > MOST_BASES:
        raise RecipeError(f"{file}: more than {MOST_BASES} recipes are based on one another; join some of them")
    source = _read(file)
    place = source.place(("base",))
    waiting = source.unreadable.pop(("base",), None)
    if waiting is not None:
        raise RecipeError(str(waiting))
    base = source.data.pop("base", None)
    if base is None:
        return source
    if not isinstance(base, str) or not base:
        raise RecipeError(f"{place}: base: expected the path or name of one recipe, got {base!r:.100}")
    parent = _read_with_bases(_find_base(base, file, place), notes, (*children, file.resolve()))
    for key in NOT_INHERITED:
        parent.forget((key,), parent.data.pop(key, None))
    _lay_over(parent, source, notes)
    return parent


def _find_base(base: str, file: Path, place: str) -> Path:
    for folder in (file.parent, recipes_folder()):
        for name in (base, f"{base}.yaml"):
            if os.path.isfile(folder / name):
                return folder / name
    if os.path.exists(file.parent / base):
        raise RecipeError(f"{place}: base: {base} is not a file; a recipe is a YAML file")
    guess = did_you_mean(Path(base).stem, shipped_recipes())
    raise RecipeError(
        f"{place}: base: there is no recipe {base[:LONGEST_NAME]} beside this file or among the shipped ones{guess}"
    )


def _lay_over(parent: Source, child: Source, notes: list[str]) -> None:
    """Merge ``child`` into ``parent``: mappings deeply, tasks by name, everything else by replacement."""
    notes += task_list.align(parent, child) + drop_conflicts(parent, _layer(child))

    def merge(below: dict[str, Any], above: dict[str, Any], path: KeyPath) -> None:
        for key, value in above.items():
            here = (*path, key)
            old = below.get(key)
            if isinstance(value, dict) and isinstance(old, dict):
                merge(old, value, here)
            elif here == task_list.TASK_LIST and isinstance(value, list) and isinstance(old, list):
                merge_aligned(old, value)
            else:
                parent.forget(here, old)
                below[key] = value

    def merge_aligned(below: list[Any], above: list[Any]) -> None:
        for index, entry in enumerate(above):
            if index < len(below) and isinstance(below[index], dict) and isinstance(entry, dict):
                merge(below[index], entry, (*task_list.TASK_LIST, index))
            else:
                below[index:] = [entry]

    merge(parent.data, child.data, ())
    parent.places.update(child.places)
    parent.problems += child.problems
    parent.unreadable.update(child.unreadable)


def _layer(child: Source) -> Layer:
    """The layer of a file. Its lists replace those of the base; only tasks are merged with those of the same name."""

    def section(path: KeyPath) -> dict[str, Any]:
        value: Any = child.data
        for position, part in enumerate(path):
            if path[:position] == task_list.TASK_LIST and isinstance(value, list) and isinstance(part, int):
                value = value[part] if part < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    return Layer(
        lambda path: section(path[:-1]).get(str(path[-1])), lambda path: path[-1] in section(path[:-1]), child.place
    )


def _validate(source: Source, file: Path) -> Recipe:
    return validated(source, str(file), Recipe, contradictions)


def validated(
    source: Source, called: str, section: type[Valid], contradicts: Callable[[Valid], Iterator[tuple[KeyPath, str]]]
) -> Valid:
    """A recipe, or a part of one that has the same paths, from plain values.

    Args:
        called: what messages call it.
        contradicts: yields contradictions between its values.

    Raises:
        RecipeError: lists every mistake, one line each.
    """
    found = source.problems + list(source.unreadable.values())
    result = _parse(source.data, section)
    if not isinstance(result, list):
        found += [Problem(source.place(path), path, text) for path, text in contradicts(result)]
    else:
        # A value with an unset environment variable is null; neither it nor its section is validated.
        waiting = {path[:length] for path in source.unreadable for length in range(1, len(path) + 1)}
        found += [problem for problem in problems.explain(result, source) if problem.path not in waiting]
    if found or isinstance(result, list):
        shown = sorted(found, key=_in_order)[:SHOWN]
        lines = [f"  {_by_name(problem, source)}{_elsewhere(problem, source)}" for problem in shown]
        if len(found) > SHOWN:
            lines.append(f"  and {len(found) - SHOWN} more")
        if sum(len(problem.path) == 1 and problem.text == "is required" for problem in found) > 1:
            lines.append(
                "  name a recipe that has what is missing, such as base: qwen3-0.6b-power-32k "
                "(`sparsetrain recipe list`)"
            )
        raise RecipeError(f"{called} has {counted(len(found), 'problem')}:\n" + "\n".join(lines))
    return result


def _by_name(problem: Problem, source: Source) -> Problem:
    return replace(problem, path=task_list.named(problem.path, source.data))


def _elsewhere(problem: Problem, source: Source) -> str:
    """The places of the other settings that a problem names."""
    return problems.elsewhere(
        problem.text, task_list.named_places(source), (problem.place.rpartition(":")[0], problem.place)
    )


def _in_order(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.place.rpartition(":")
    return (file, int(line)) if line.isdecimal() and len(line) < 10 else (problem.place, 0)


def _parse(data: dict[str, Any], section: type[Valid]) -> Valid | list[Any]:
    """The section, or pydantic's errors. Types are strict: ``"30"`` is not a number and ``1`` is not true."""
    try:
        return section.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        errors = error.errors()
    # YAML parses 1e9 as a float, but it is a natural way to write a number of tokens.
    whole = [error for error in errors if error["type"] == "int_type" and _is_whole(error["input"])]
    for each in whole:
        *above, last = problems.located(each, data)
        container: Any = data
        for part in above:
            container = container[part]
        container[last] = int(each["input"])
    return _parse(data, section) if whole else errors


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST
