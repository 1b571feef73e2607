"""Remove inherited settings that conflict with a new layer of a recipe (a file over its base, overrides over a file).

If settings exclude one another, the upper layer's is kept. Settings that belong to a model, a source or a method are
dropped when the upper layer replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sparsetrain.evaluation.registry import TASKS
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.registry import config_or_none
from sparsetrain.recipe.task_list import TASK_LIST, named, task_entries
from sparsetrain.recipe.yaml_source import OVERRIDE, KeyPath, Source, dotted

ALTERNATIVES = (
    ("train", ("steps", "epochs", "tokens")),
    ("train", ("global_batch_sequences", "global_batch_tokens")),
    ("model", ("path", "architecture")),
)
"""Settings of a section that exclude one another."""

OF_A_MODEL = ("revision", "trust_remote_code")
"""Settings that belong to one pretrained model and do not apply to another."""

ORIGIN = ("path", "synthetic")
"""Settings that identify a source."""

OF_A_MIXTURE = ("weight",)
"""Settings of a source for its role in the mixture, which are kept if the source is replaced."""


@dataclass(frozen=True)
class Layer:
    """The settings of a file or of the command line."""

    get: Callable[[KeyPath], Any]
    """The value given for a path; None if there is none."""
    names: Callable[[KeyPath], bool]
    """Whether a value is given for a path, null included."""
    place: Callable[[KeyPath], str]
    """Where a path is set, for messages."""


def drop_conflicts(below: Source, layer: Layer) -> list[str]:
    """Remove from a recipe, in place, the settings that conflict with a layer that will be merged over it.

    Returns:
        A sentence for each removal.
    """
    return [
        note
        for rule in (_model, _alternatives, _architecture, _tasks, _sources, _trained, _method)
        for note in rule(below, layer)
    ]


def _alternatives(below: Source, layer: Layer) -> Iterator[str]:
    for section, names in ALTERNATIVES:
        given = [(section, name) for name in names if layer.get((section, name)) is not None]
        if given:
            yield from _drop(below, layer, (section,), set(names), given[0])


def _model(below: Source, layer: Layer) -> Iterator[str]:
    """Another model: ``revision`` is a commit of the old one, and ``trust_remote_code`` was meant for its code."""
    model = _mapping(below, ("model",))
    for name in ("path", "architecture"):
        given = layer.get(("model", name))
        if given is not None and (name == "architecture" or model.get(name) != given):
            outlived = OF_A_MODEL + (("tokenizer",) if name == "path" and model.get("architecture") is not None else ())
            yield from _drop(below, layer, ("model",), outlived, ("model", name))
            yield from _kept_config(below, layer, ("model", name))


def _kept_config(below: Source, layer: Layer, of: KeyPath) -> Iterator[str]:
    """Changes to the config stay, as the new path may be a copy of the model; for another one they may be wrong."""
    path = ("model", "config_overrides")
    given = layer.get(path)
    inside = given if isinstance(given, dict) else {}
    # A file merges its mapping, null takes all away, and one override of the whole mapping replaces it.
    replaced = layer.names(path) and (
        given is None
        or (layer.place(path).startswith(OVERRIDE) and not inside)
        or not all(layer.names((*path, *key.split("."))) for key in inside)
    )
    old = _mapping(below, path)
    kept = [f"{key}={_short(value)}" for key, value in old.items() if not layer.names((*path, key))]
    if kept and not replaced:
        yield (
            f"{_where(layer, of)}{dotted(of)}={_short(layer.get(of))} keeps model.config_overrides of the old model "
            f"({below.place(path)}): {', '.join(kept)}; model.config_overrides: null drops them"
        )


def _architecture(below: Source, layer: Layer) -> Iterator[str]:
    path = ("model", "architecture")
    old, kind = _mapping(below, path), layer.get((*path, "model_type"))
    if kind is not None and old.get("model_type", kind) != kind:
        yield from _drop(below, layer, path, list(old), (*path, "model_type"))


def _tasks(below: Source, layer: Layer) -> Iterator[str]:
    """Another task of the same name: the settings of the old one do not apply."""
    for index, entry in enumerate(task_entries(below.data)):
        path = (*TASK_LIST, index)
        given = layer.get((*path, "task"))
        if given is not None and isinstance(entry, dict) and entry.get("task", given) != given:
            yield from _drop(below, layer, path, [key for key in entry if key != "name"], (*path, "task"))


def _sources(below: Source, layer: Layer) -> Iterator[str]:
    """A source replaces a source: the columns, split and streaming of the old one do not apply to the new one."""
    data = _mapping(below, ("data",)).get("sources")
    listed: list[KeyPath] = [("data", "sources", index) for index in range(len(data))] if isinstance(data, list) else []
    others: list[KeyPath] = [
        (*TASK_LIST, index, name)
        for index, entry in enumerate(task_entries(below.data))
        for section in TASKS.usable([entry.get("task")] if isinstance(entry, dict) else [])
        for name in section.source_fields()
    ]
    for path in listed + others:
        old = _mapping(below, path)
        new = [name for name in ORIGIN if layer.get((*path, name)) is not None]
        if new and any(old.get(name) != layer.get((*path, name)) for name in new):
            kept = OF_A_MIXTURE if path in listed else ()
            yield from _drop(below, layer, path, [name for name in old if name not in kept], (*path, new[0]))


def _trained(below: Source, layer: Layer) -> Iterator[str]:
    """Adapters, or training only the new modules."""
    parameters = ("train", "parameters")
    if layer.get(parameters) == "new_modules":
        yield from _drop(below, layer, (), ("lora",), parameters)
    elif layer.get(("lora",)) is not None and _mapping(below, ("train",)).get("parameters") == "new_modules":
        yield from _drop(below, layer, ("train",), ("parameters",), ("lora",))


def _method(below: Source, layer: Layer) -> Iterator[str]:
    """Another method keeps the settings that the nearest common base class of both configs defines: ``dense_layers``
    always, ``block`` between block patterns. Other fields of the same name, such as ``window``, may have another
    meaning."""
    path = ("attention", "method")
    old, method = _mapping(below, ("attention",)), layer.get(path)
    if method is None or old.get("method", method) == method:
        return
    # An unknown method has only the base fields in common; the validation reports it later.
    ancestors = (config_or_none(old["method"]) or MethodConfig).__mro__
    new = config_or_none(method) or MethodConfig
    common = next(a for a in ancestors if issubclass(a, MethodConfig) and issubclass(new, a)).model_fields
    dropped = [f"{key}={_short(value)}" for key, value in old.items() if key not in common]
    kept = [key for key in old if key in common and key != "method"]
    before = f"{old['method']} ({below.place(path)})"
    for key in [key for key in old if key not in kept]:
        below.forget(("attention", key), old.pop(key))
    yield (
        f"{_where(layer, path)}attention.method={_short(method)} replaces {before}"
        + (f": {', '.join(dropped)} dropped" if dropped else "")
        + (f", {', '.join(kept)} kept" if kept else "")
        + "; other parameters are the new method's defaults or those given with it"
    )


def _drop(
    below: Source, layer: Layer, section: KeyPath, names: Collection[str], for_the_sake_of: KeyPath
) -> Iterator[str]:
    """Remove settings from a section, except those that the layer sets itself; yield a sentence if any had a value."""
    old = _mapping(below, section)
    called = {name: dotted(named((*section, name), below.data)) for name in names}
    new = f"{dotted(named(for_the_sake_of, below.data))}={_short(layer.get(for_the_sake_of))}"
    gone = []
    for name in [name for name in names if name in old and not layer.names((*section, name))]:
        path, value = (*section, name), old.pop(name)
        if value is not None:
            gone.append(f"{called[name]}={_short(value)} ({below.place(path)})")
        below.forget(path, value)
    if gone:
        yield f"{_where(layer, for_the_sake_of)}{new} replaces {', '.join(gone)}"


def _mapping(source: Source, path: KeyPath) -> dict[str, Any]:
    """The mapping at a path; empty if there is something else."""
    value = source.data
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return {}
    return value if isinstance(value, dict) else {}


def _where(layer: Layer, path: KeyPath) -> str:
    """The file and line of a setting; empty for an override, which names itself."""
    place = layer.place(path)
    return "" if place.startswith(OVERRIDE) else f"{place}: "


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
