"""Names of a source's columns, keys of turns and roles that are not the usual ones, and what they mean here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from sparsetrain.source_section import DataSource

Pairs = tuple[tuple[str, str], ...]
"""A mapping as pairs, so that it can be hashed."""


@dataclass(frozen=True)
class Naming:
    """The maps of a source, from its own names to ours."""

    columns: Pairs = ()
    turn_keys: Pairs = ()
    roles: Pairs = ()
    """Roles in lower case."""

    @classmethod
    def of(cls, source: DataSource) -> Naming:
        """The maps that a recipe gives for a source."""
        roles = (
            (theirs.lower(), ours)
            for ours, names in source.roles.items()
            for theirs in ([names] if isinstance(names, str) else names)
        )
        return cls(_turned(source.columns), _turned(source.turn_keys), tuple(roles))

    def row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row under our names of its columns.

        Raises:
            MalformedRow: It has a column of such a name itself.
        """
        return _renamed(row, self.columns, "columns", "it") if self.columns else row

    def turn(self, turn: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """A turn under our names of its keys; ``name`` says which it is.

        Raises:
            MalformedRow: It has a key of such a name itself.
        """
        return _renamed(turn, self.turn_keys, "turn_keys", name) if self.turn_keys else turn

    def role(self, role: str) -> str:
        """Our name of a role; its own where the recipe gives none."""
        return dict(self.roles).get(role.lower(), role)


def _turned(names: Mapping[Any, str]) -> Pairs:
    return tuple((theirs, ours) for ours, theirs in names.items())


def _renamed(given: Mapping[str, Any], names: Pairs, setting: str, what: str) -> dict[str, Any]:
    renamed = dict(given)
    moved = {ours: renamed.pop(theirs) for theirs, ours in names if theirs in renamed}
    for ours, value in moved.items():
        if renamed.get(ours) is not None and value is not None:
            theirs = next(theirs for theirs, name in names if name == ours)
            raise MalformedRow(
                f"{what} has {ours!r} beside {theirs!r}, which {setting} of its source gives that name; leave one of "
                "them out"
            )
        if value is not None or ours not in renamed:
            renamed[ours] = value
    return renamed
