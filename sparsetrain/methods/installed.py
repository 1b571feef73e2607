"""Methods of other installed packages, found by the entry-point group ``sparsetrain.methods``.

An entry point names a config: ``thirds = every_third:ThirdsConfig``. A package is imported when its method is used, so
that one that is broken stops nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparsetrain.errors import ModelError, first_line
from sparsetrain.methods.base import MethodConfig

GROUP = "sparsetrain.methods"


@cache
def entries() -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of the group by the name of their method. More than one claim a name by mistake."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return {name: tuple(found[name]) for name in sorted(found)}


def package_of(name: str) -> str | None:
    """The package that a method comes from, with its version; None if it is one of ours or of none."""
    found = entries().get(name)
    return None if found is None else _package(found[0])


@cache
def load_installed(name: str, own: Collection[str]) -> type[MethodConfig]:
    """The config of an installed method.

    Args:
        name: a name in :func:`entries`.
        own: the names of our own methods.

    Raises:
        ModelError: its package cannot be used, or the name is taken; the message names the package and what to do.
    """
    found = entries()[name]
    packages = [_package(entry) for entry in found]
    if name in own:
        raise ModelError(
            f"attention.method={name} is a method of sparsetrain, and {' and '.join(packages)} claims the same name; "
            "uninstall the package, or rename its entry point"
        )
    if len(found) > 1:
        raise ModelError(
            f"attention.method={name} is claimed by {' and by '.join(packages)}; uninstall all of them but one"
        )
    try:
        config: Any = found[0].load()
        fault = _fault(name, config)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
    if fault is not None:
        raise ModelError(
            f"attention.method={name} comes from the package {packages[0]}, which cannot be used: {fault}. Repair or "
            f"reinstall the package, or choose another method: {', '.join(own)}"
        )
    usable: type[MethodConfig] = config
    return usable


def _fault(name: str, config: Any) -> str | None:
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        return f"{config!r:.100} is no subclass of sparsetrain.methods.base.MethodConfig"
    if inspect.isabstract(config):
        return f"{config.__name__} lacks {', '.join(sorted(config.__abstractmethods__))}"
    called = config.model_fields["method"].default
    if called != name:
        return f"its entry point is named {name}, but {config.__name__}.method is {called!r}; they must be equal"
    return None


def _package(entry: EntryPoint) -> str:
    if entry.dist is None:
        return entry.value
    return f"{entry.dist.name} {entry.dist.version}"
