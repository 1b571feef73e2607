"""Lay pieces of documents into rows: best fit, longest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from sparsetrain.data.document import MIN_TOKENS


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """The pieces of each row: each piece, longest first, goes into the row that has the least room for it.

    Args:
        lengths: tokens of each piece, none more than ``row_length``.

    Returns:
        Places in ``lengths``: ascending within a row, rows by their first.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        best = bisect_left(rooms, (lengths[place], -1))
        if best < len(rooms):
            room, row = rooms.pop(best)
            rows[row].append(place)
        else:
            room, row = row_length, len(rows)
            rows.append([place])
        if room - lengths[place] >= MIN_TOKENS:
            insort(rooms, (room - lengths[place], row))
    return sorted(sorted(row) for row in rows)
