"""Refuse names of keys of turns that no turn of a source has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from sparsetrain.data.columns import Layout, fields_of
from sparsetrain.data.values import MalformedRow, listed, parsed
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from sparsetrain.data.forms import RowForm
    from sparsetrain.source_section import DataSource


def check_turn_keys(source: DataSource, form: RowForm, layout: Layout, rows: Iterable[Mapping[str, Any]]) -> None:
    """Read raw rows until each name of ``turn_keys`` was seen.

    Raises:
        DataError: No turn has a key of such a name, so that what it says would have no effect.
    """
    seen: set[str] = set()
    missing = {theirs: ours for ours, theirs in source.turn_keys.items()}
    for raw in rows if missing else ():
        for turn in _turns(raw, form, layout):
            seen.update(turn)
        if not (missing := {theirs: ours for theirs, ours in missing.items() if theirs not in seen}):
            return
    for theirs, ours in missing.items():
        near = get_close_matches(theirs, seen, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        has = f"they have {listed(sorted(seen))}" if seen else "there are no turns"
        raise DataError(
            f"data source {source.label!r}: turn_keys says that {ours} is in {theirs!r}{hint}, and no turn has such a "
            f"key; {has}"
        )


def _turns(raw: Mapping[str, Any], form: RowForm, layout: Layout) -> Iterator[Mapping[str, Any]]:
    """The turns of a raw row; none where it cannot be read, which is told when it is rendered."""
    try:
        row = form.naming.row(fields_of(raw, layout))
        for field in form.fields:
            value = row.get(field)
            if isinstance(value, str) and value.lstrip().startswith("["):
                value = parsed(value, field)
            turns = [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []
            for turn in turns:
                if isinstance(turn, Mapping):
                    yield {key: content for key, content in turn.items() if content is not None}
    except MalformedRow:
        return
