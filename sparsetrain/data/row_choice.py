"""Which rows of a source are read: the first ones, and the part that is trained on or held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.errors import DataError
from sparsetrain.randomness import generator

if TYPE_CHECKING:
    from sparsetrain.source_section import DataSource


def chosen_rows(source: DataSource, rows: Any) -> Any:
    """The rows of a ``datasets.Dataset`` or ``IterableDataset`` that a source reads.

    ``max_rows`` takes the first ones. ``validation`` splits these: which ones are held out depends on their number
    alone, not on the seed of a run or on where the files lie.

    Raises:
        DataError: The split has no row.
    """
    if source.max_rows is not None:
        rows = rows.take(source.max_rows)
    return rows if source.validation is None else rows.select(kept_rows(source, len(rows)))


def kept_rows(source: DataSource, total: int) -> np.ndarray | None:
    """The numbers of the rows that its split reads of ``total``, ascending; None for all.

    Raises:
        DataError: The split has no row.
    """
    if source.validation is None:
        return None
    held_out = source.held_out_of(total)
    if not 0 < held_out < total:
        raise DataError(
            f"data source {source.label!r}: validation={source.validation:g} holds out {held_out} of {total:,} rows, "
            f"which leaves none for {'training' if held_out else 'validation'}; give another number"
        )
    order = generator(0, "validation", total).permutation(total)
    return np.sort(order[:held_out] if source.split == "validation" else order[held_out:])
