"""Settings of the command line: ``train.lr=2e-5``, ``data.sources.0.path=corpus.jsonl``, ``attention.method=full``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsetrain.errors import RecipeError
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.registry import METHODS
from sparsetrain.recipe.yaml_source import OVERRIDE, KeyPath, Source, dotted, parse_yaml


def apply_overrides(source: Source, overrides: Sequence[str]) -> list[str]:
    """Lay ``key=value`` settings over a recipe, in place.

    Returns:
        Notes on what they replaced beyond the values they name.

    Raises:
        RecipeError: an override is not ``key=value``, or leads through something that has no settings inside.
    """
    notes: list[str] = []
    parsed: list[tuple[KeyPath, Source]] = []
    for text in overrides:
        place = f"{OVERRIDE} {text}"
        key, equals, value = text.partition("=")
        path: KeyPath = tuple(key.split("."))
        if not equals or not all(path):
            raise RecipeError(f"{place}: expected key=value, such as train.lr=2e-5")
        if key == "base":
            raise RecipeError(f"{place}: base belongs in a file; write a recipe with this base, or copy it")
        parsed.append((path, parse_yaml(value, place, number_lines=False)))
    # The method first: other attention settings on the command line belong to the new one, in any order.
    parsed.sort(key=lambda override: override[0] != ("attention", "method"))
    for path, value_source in parsed:
        if path == ("attention", "method"):
            notes += _change_method(source, value_source.data)
        _set(source, path, value_source)
    return notes


def _change_method(source: Source, method: Any) -> list[str]:
    """Keep of the attention section what its old method and the new one have in common, and say so.

    That is what their nearest common ancestor defines: ``dense_layers`` always, ``block`` between block patterns. A
    field of the same name elsewhere, such as ``window``, may mean another budget.
    """
    section = source.data.get("attention")
    if not isinstance(section, dict) or section.get("method") == method:
        return []
    ancestors = METHODS.get(str(section.get("method")), MethodConfig).__mro__
    new = METHODS.get(str(method), MethodConfig)
    common = next(a for a in ancestors if issubclass(a, MethodConfig) and issubclass(new, a)).model_fields
    kept = {key: value for key, value in section.items() if key in common and key != "method"}
    dropped = [f"{key}={value}" for key, value in section.items() if key not in common]
    source.settle(("attention",))
    source.data["attention"] = kept
    return [
        f"attention.method={method} replaces the file's {section.get('method')}"
        + (f": {', '.join(dropped)} dropped" if dropped else "")
        + (f", {', '.join(kept)} kept" if kept else "")
        + "; other parameters are the new method's defaults or this command line's"
    ]


def _set(source: Source, path: KeyPath, value: Source) -> None:
    """Put an override's value into the tree, making the sections on the way."""
    place = value.places[()]
    container: Any = source.data
    real: KeyPath = ()
    for position, part in enumerate(path):
        key: str | int = part
        if isinstance(container, list):
            if not str(part).isdigit() or int(part) >= len(container):
                raise RecipeError(
                    f"{place}: {dotted(real)} is a list of {len(container)}; name an entry by its number, from 0"
                )
            key = int(part)
        elif not isinstance(container, dict):
            raise RecipeError(f"{place}: {dotted(real)} is {container!r}, which has no settings inside")
        real = (*real, key)
        if position < len(path) - 1:
            if isinstance(container, dict) and container.get(str(key)) is None:
                container[str(key)] = {}
                source.places[real] = place
            container = container[key]
        else:
            container[key] = value.data
    source.settle(real)
    for known in [known for known in source.places if known[: len(real)] == real]:
        del source.places[known]
    source.places.update({(*real, *inner): where for inner, where in value.places.items()})
    source.problems += value.problems
    source.unset.update({(*real, *inner): problem for inner, problem in value.unset.items()})
