"""Refuse names of keys and roles (``turn_keys``, ``roles``) that no turn of a source has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsetrain.counted import counted
from sparsetrain.data.values import MalformedRow, listed, parsed
from sparsetrain.errors import DataError
from sparsetrain.nearest import did_you_mean

if TYPE_CHECKING:
    from sparsetrain.data.forms import RowForm
    from sparsetrain.data.naming import Pairs
    from sparsetrain.source_section import DataSource

FIRST_ROWS = 1000
"""Rows that are searched for a name where not all are read: of a stream, and before a run."""


@dataclass
class _Names:
    """What one setting names, and the names that the turns have."""

    setting: str
    thing: str
    missing: dict[str, list[str]]
    """By our name the source's names, of which no turn had any yet."""
    seen: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, setting: str, thing: str, pairs: Pairs) -> _Names:
        """The names of a setting."""
        names: dict[str, list[str]] = {}
        for theirs, ours in pairs:
            names.setdefault(ours, []).append(theirs)
        return cls(setting, thing, names)

    def look(self, names: Iterable[str]) -> None:
        """Note the names of a turn."""
        self.seen.update(names)
        self.missing = {ours: theirs for ours, theirs in self.missing.items() if not self.seen.intersection(theirs)}

    def fault(self) -> str:
        """What is said that no turn has."""
        ours, theirs = next(iter(self.missing.items()))
        hint = did_you_mean(theirs[0], self.seen, " ({})", write=repr)
        has = f"they have {listed(sorted(self.seen))}" if self.seen else "there are no turns"
        said = " or ".join(map(repr, theirs))
        return f"{self.setting} says that {ours} is {said}{hint}, and no turn has such a {self.thing}; {has}"


def check_turn_names(
    source: DataSource, form: RowForm, rows: Iterable[Mapping[str, Any]], *, most: int | None = None
) -> str | None:
    """Read rows until each key of ``turn_keys`` and a name of each role in ``roles`` was seen.

    Args:
        rows: The columns of the rows.
        most: Rows to read at most; None: all.

    Returns:
        A warning if there are more rows than ``most``, and none of those that were read has a name.

    Raises:
        DataError: No turn has a name, so that what is said of it would have no effect.
    """
    naming = form.naming
    keys, roles = _Names.of("turn_keys", "key", naming.turn_keys), _Names.of("roles", "role", naming.roles)
    left = iter(rows)
    number = 0
    while keys.missing or roles.missing:
        row = next(left, None)
        fault = f"data source {source.label!r}: {(keys if keys.missing else roles).fault()}"
        if row is None:
            raise DataError(fault)
        if number == most:
            return f"{fault} (in the first {counted(number, 'row')}; the others are not searched)"
        number += 1
        for turn, role in _turns(row, form):
            keys.look(turn)
            roles.look([role.lower()] if isinstance(role, str) else [])
    return None


def _turns(raw: Mapping[str, Any], form: RowForm) -> Iterator[tuple[list[str], Any]]:
    """The keys and the role of each turn of a row; none where it cannot be read, which is told when it is rendered."""
    with suppress(MalformedRow):
        row = form.naming.row(raw)
        for name in form.fields:
            value = row.get(name)
            if isinstance(value, str) and value.lstrip().startswith("["):
                value = parsed(value, name)
            turns = [value] if isinstance(value, Mapping) else value
            for turn in turns if isinstance(turns, list) else ():
                if isinstance(turn, Mapping):
                    named = form.naming.turn(turn, "a turn")
                    own = [key for key, content in turn.items() if content is not None]
                    yield own, named.get("role") or named.get("from")
