"""From a file and overrides to a :class:`Recipe`: inheritance, environment variables, overrides, validation."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import problems
from sparsetrain.recipe.consistency import contradictions, without_effect
from sparsetrain.recipe.overrides import apply_overrides
from sparsetrain.recipe.schema import SCHEMA_VERSION, Recipe
from sparsetrain.recipe.shipped import find_recipe, recipes_folder, shipped_recipes
from sparsetrain.recipe.yaml_source import KeyPath, Problem, Source, dump_yaml, parse_yaml

NOT_INHERITED = ("name", "output")
"""What a recipe never takes from its base: two runs must not share a name or a folder."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, the file it came from, and what its reader should know."""

    recipe: Recipe
    path: Path
    notes: list[str]
    """What was replaced or has no effect, one sentence each. To be printed, not to be ignored."""

    @property
    def resolved(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain values."""
        return self.recipe.model_dump(mode="json")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, merge and validate a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe such as ``quickstart``.
        overrides: ``key=value`` settings laid over the file: ``train.lr=2e-5``, ``data.sources.0.path=corpus.jsonl``,
            ``eval.passkey.lengths=[512,1024]``. Values are YAML and are validated like the file's. ``attention.method``
            replaces the section by the new method's defaults, except what both methods have (``dense_layers``, and
            ``block`` between block patterns).

    Raises:
        RecipeError: with every mistake of the recipe, one line each, naming the file and line or the override.
    """
    file = find_recipe(path)
    notes: list[str] = []
    source = _read_with_bases(file, notes, ())
    notes += apply_overrides(source, overrides)
    _refuse_newer(source)
    source.data["name"] = source.data.get("name") or file.stem
    source.data["output"] = source.data.get("output") or f"runs/{source.data['name']}"
    recipe = _validate(source, file)
    return LoadedRecipe(recipe, file, notes + without_effect(recipe))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with all its defaults as YAML, which :func:`load_recipe` reads back as an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read(file: Path) -> Source:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{file}: not a text file in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    source = parse_yaml(text, str(file))
    if source.data is None:
        raise RecipeError(f"{file}: is empty; start from `sparsetrain recipe copy quickstart`")
    if not isinstance(source.data, dict):
        raise RecipeError(
            f"{file}: a recipe is a mapping of sections (model:, attention:, data:, ...), "
            f"not a {type(source.data).__name__}"
        )
    _refuse_newer(source)
    return source


def _refuse_newer(source: Source) -> None:
    version = source.data.get("version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RecipeError(
            f"{source.place(('version',))}: the recipe is written for schema version {version}, and this sparsetrain "
            f"reads versions up to {SCHEMA_VERSION}; upgrade it: pip install --upgrade sparsetrain"
        )


def _read_with_bases(file: Path, notes: list[str], children: tuple[Path, ...]) -> Source:
    if file.resolve() in children:
        chain = " -> ".join(path.name for path in (*children, file))
        raise RecipeError(f"{file}: base recipes form a cycle: {chain}")
    source = _read(file)
    place = source.place(("base",))
    base = source.data.pop("base", None)
    if base is None:
        return source
    if not isinstance(base, str):
        raise RecipeError(f"{place}: base: expected the path or name of one recipe, got {base!r}")
    parent = _read_with_bases(_find_base(base, file, place), notes, (*children, file.resolve()))
    for key in NOT_INHERITED:
        parent.data.pop(key, None)
        parent.settle((key,))
    _lay_over(parent, source, notes)
    return parent


def _find_base(base: str, file: Path, place: str) -> Path:
    for folder in (file.parent, recipes_folder()):
        for name in (base, f"{base}.yaml"):
            if (folder / name).is_file():
                return folder / name
    nearest = difflib.get_close_matches(Path(base).stem, shipped_recipes(), n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    raise RecipeError(f"{place}: base: there is no recipe {base} beside this file or among the shipped ones{guess}")


def _lay_over(parent: Source, child: Source, notes: list[str]) -> None:
    """Merge ``child`` into ``parent``: mappings deeply, everything else by replacement."""

    def merge(below: dict[str, Any], above: dict[str, Any], path: KeyPath) -> None:
        for key, value in above.items():
            here = (*path, key)
            old = below.get(key)
            if isinstance(value, dict) and isinstance(old, dict) and not changes_method(here, old, value):
                merge(old, value, here)
            else:
                parent.settle(here)
                below[key] = value

    def changes_method(path: KeyPath, old: dict[str, Any], new: dict[str, Any]) -> bool:
        changed = path == ("attention",) and new.get("method", old.get("method")) != old.get("method")
        if changed:
            notes.append(
                f"{child.place(('attention', 'method'))}: attention.method is {new['method']} here and "
                f"{old.get('method')} in the base, so the base's attention section is not inherited"
            )
        return changed

    merge(parent.data, child.data, ())
    parent.places.update(child.places)
    parent.problems += child.problems
    parent.unset.update(child.unset)


def _validate(source: Source, file: Path) -> Recipe:
    found = source.problems + list(source.unset.values())
    result = _parse(source.data)
    if isinstance(result, Recipe):
        found += [Problem(source.place(path), path, text) for path, text in contradictions(result)]
    else:
        # A value that waits for a variable is null until then; neither it nor its section is judged.
        waiting = {path[:length] for path in source.unset for length in range(1, len(path) + 1)}
        found += [problem for problem in problems.explain(result, source) if problem.path not in waiting]
    if found or not isinstance(result, Recipe):
        lines = "\n".join(f"  {problem}" for problem in sorted(found, key=_in_order))
        raise RecipeError(f"{file} has {len(found)} problem{'s' if len(found) > 1 else ''}:\n{lines}")
    return result


def _in_order(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.place, 0)


def _parse(data: dict[str, Any]) -> Recipe | list[Any]:
    """The recipe, or pydantic's errors. Strict as JSON is: ``"30"`` is no number and ``1`` is not true."""
    try:
        return Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        errors = error.errors()
    # 1e9 is a float to YAML, and the natural way to write a number of tokens.
    whole = [error for error in errors if error["type"] == "int_type" and _is_whole(error["input"])]
    for each in whole:
        *above, last = problems.located(each, data)
        container: Any = data
        for part in above:
            container = container[part]
        container[last] = int(each["input"])
    return _parse(data) if whole else errors


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()
