"""Read pretokenised rows: ``input_ids`` with ``labels`` and masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from sparsetrain.counted import counted
from sparsetrain.data.document import IGNORE
from sparsetrain.data.known_columns import MASKS
from sparsetrain.data.values import MalformedRow, described, value_of


def read_tokens(
    row: Mapping[str, Any], field: str, optional: Collection[str], vocabulary: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a row without its padding, and the half-open spans of them that carry loss.

    Args:
        field: the column of the tokens.
        optional: columns read beside it: ``labels`` (the tokens themselves, not shifted, or -100) and masks of 0 and 1.
        vocabulary: tokens that there are.

    Raises:
        MalformedRow: a column is no list of integers, they differ in length, a token does not exist, or a label is
            another token than the one at its place.
    """
    input_ids = _integers(value_of(row, field), repr(field))
    if len(input_ids) and not (input_ids.min() >= 0 and input_ids.max() < vocabulary):
        wrong = int(input_ids.min() if input_ids.min() < 0 else input_ids.max())
        raise MalformedRow(f"{field!r} holds the token {wrong}, and the tokenizer has {vocabulary:,}")
    columns = {name: _integers(row[name], repr(name)) for name in optional if row.get(name) is not None}
    for name, values in columns.items():
        if len(values) != len(input_ids):
            raise MalformedRow(
                f"{name!r} has {counted(len(values), 'value')} beside {counted(len(input_ids), 'token')}"
            )
        if name in MASKS and not np.isin(values, (0, 1)).all():
            raise MalformedRow(f"{name!r} holds other values than 0 and 1")
    real = columns.pop("attention_mask", np.ones_like(input_ids)) == 1
    learned = np.ones_like(input_ids)
    if "labels" in columns:
        labels = columns.pop("labels")
        wrong_places = np.flatnonzero((labels != IGNORE) & (labels != input_ids))
        if len(wrong_places):
            place = int(wrong_places[0])
            raise MalformedRow(
                f"'labels' has {labels[place]} at token {place}, which is {input_ids[place]}; labels must be -100 or "
                "the token itself, at its own place"
            )
        learned = (labels != IGNORE).astype(input_ids.dtype)
    for mask in columns.values():
        learned = learned * mask
    if not real.all():
        inner = np.flatnonzero(real)
        if len(inner) and not real[inner[0] : inner[-1] + 1].all():
            raise MalformedRow("'attention_mask' leaves out tokens between others; only padding at the ends can be")
        input_ids, learned = input_ids[real], learned[real]
    marks = np.diff([0, *learned.tolist(), 0])
    spans = list(zip(np.flatnonzero(marks > 0).tolist(), np.flatnonzero(marks < 0).tolist()))
    return (input_ids.tolist(), spans) if spans else ([], [])


def _integers(value: Any, name: str) -> np.ndarray:
    """int64 ``[n]``; of a mask also from booleans, which are no tokens."""
    truths = name in map(repr, MASKS)
    whole = isinstance(value, list) and all(
        isinstance(each, int) and (truths or not isinstance(each, bool)) for each in value
    )
    try:
        return np.array(value, dtype=np.int64).reshape(-1) if whole else _refuse(value, name)
    except OverflowError:
        return _refuse(value, name)


def _refuse(value: Any, name: str) -> np.ndarray:
    what = "a list of other things" if isinstance(value, list) else described(value)
    raise MalformedRow(f"{name} is {what}, not a list of tokens' numbers")
