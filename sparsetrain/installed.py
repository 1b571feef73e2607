"""Load attention methods and evaluation tasks of other installed packages through entry points.

An entry point names a section class: ``thirds = every_third:ThirdsConfig``. A package is imported only when its section
is used, so that a broken package does not affect others.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from sparsetrain.errors import SparsetrainError, first_line

Kind = TypeVar("Kind", bound=BaseModel)


class Installed(Generic[Kind]):
    """The sections of one entry-point group.

    Args:
        group: The group of the entry points.
        base: The base class of all sections.
        key: The field of a section that holds its name.
        setting: The setting of a recipe that chooses one, for messages: ``attention.method``.
        noun: The kind of the section, for messages: ``a method``.
        error: The error class to raise if a package cannot be used.
    """

    def __init__(
        self, group: str, base: type[Any], *, key: str, setting: str, noun: str, error: type[SparsetrainError]
    ) -> None:
        self.group, self.key, self.setting, self.noun, self.error = group, key, setting, noun, error
        self.base = base
        self._usable: dict[str, type[Kind]] = {}

    @cached_property
    def entries(self) -> dict[str, tuple[EntryPoint, ...]]:
        """The entry points by name; several for one name are a conflict."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            found.setdefault(entry.name, []).append(entry)
        return {name: tuple(found[name]) for name in sorted(found)}

    def package_of(self, name: str) -> str | None:
        """The package of a section, with its version; None for our own sections and unknown names."""
        found = self.entries.get(name)
        return None if found is None else _package(found[0])

    def load(self, name: str, own: Collection[str]) -> type[Kind]:
        """Import the section class of an installed package.

        Args:
            name: A name in :attr:`entries`.
            own: The names of our own sections.

        Raises:
            SparsetrainError: The package cannot be used, or the name is taken; names the package and a fix. Its class
                is ``error``.
        """
        if name not in self._usable:
            self._usable[name] = self._load(name, own)
        return self._usable[name]

    def _load(self, name: str, own: Collection[str]) -> type[Kind]:
        found = self.entries[name]
        packages = [_package(entry) for entry in found]
        if name in own:
            raise self.error(
                f"{self.setting}={name} is {self.noun} of sparsetrain, but {' and '.join(packages)} uses the same "
                "name; uninstall the package, or rename its entry point"
            )
        if len(found) > 1:
            raise self.error(
                f"{self.setting}={name} is provided by {' and by '.join(packages)}; uninstall all of them but one"
            )
        try:
            section: Any = found[0].load()
            fault = self._fault(name, section)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            fault = f"{type(error).__name__}: {first_line(error)}"
        if fault is not None:
            raise self.error(
                f"{self.setting}={name} comes from the package {packages[0]}, which cannot be used: {fault}. Repair or "
                f"reinstall the package, or choose another {self.noun.partition(' ')[2]}: {', '.join(own)}"
            )
        usable: type[Kind] = section
        return usable

    def _fault(self, name: str, found: object) -> str | None:
        if not (isinstance(found, type) and issubclass(found, self.base)):
            return f"{found!r:.100} is not a subclass of {self.base.__module__}.{self.base.__name__}"
        section: Any = found
        if inspect.isabstract(section):
            return f"{section.__name__} lacks {', '.join(sorted(section.__abstractmethods__))}"
        called = section.model_fields[self.key].default
        if called != name:
            return (
                f"its entry point is named {name}, but {section.__name__}.{self.key} is {called!r}; they must be equal"
            )
        return None


def _package(entry: EntryPoint) -> str:
    if entry.dist is None:
        return entry.value
    return f"{entry.dist.name} {entry.dist.version}"
