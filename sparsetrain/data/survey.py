"""Count what a recipe's data holds: rows that are read or left out and why, lengths, and tokens in an epoch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsetrain.data.document import MIN_TOKENS, Tokens
from sparsetrain.data.mapped import MALFORMED, tokenized
from sparsetrain.data.memory import memory_explained
from sparsetrain.data.sources import OpenSource, open_source, rows_of
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import DataSection
    from sparsetrain.source_section import DataSource

STREAMED_ROWS = 1000
"""Rows of a streaming source that are counted."""


@dataclass
class Survey:
    """What a source holds."""

    source: DataSource
    form: str
    """How its rows are read."""
    lengths: np.ndarray
    """Tokens of each document, integers ``[n]``."""
    learned: int = 0
    """Tokens with loss."""
    empty: int = 0
    """Rows without a document."""
    without_target: int = 0
    """Documents in which nothing is learned."""
    faults: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be read, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason, with its place."""
    cut_off: bool = False
    """Whether only the first rows of a stream were counted: it has more."""
    opened: OpenSource | None = None
    """What gives its rows."""

    @property
    def rows(self) -> int:
        """Rows looked at."""
        return len(self.lengths) + self.empty + sum(self.faults.values())

    def places(self, numbers: Collection[int]) -> dict[int, str]:
        """Where rows are, by their numbers: file and line, or the row of a table."""
        if self.opened is None or not numbers:
            return {}
        rows, reader = self.opened.open(), self.opened.reader
        if reader.layout == "table":
            found: Iterable[tuple[int, dict[str, Any]]] = ((number, {}) for number in numbers)
        elif self.source.streaming:
            found = enumerate(islice(rows_of(self.source, rows), max(numbers) + 1))
        else:
            found = ((number, rows[number]) for number in numbers)
        return {number: reader.place(raw, number) for number, raw in found if number in numbers}

    def longer_than(self, row_length: int) -> int:
        """Documents that do not fit into a row."""
        return int((self.lengths > row_length).sum())


def survey(source: DataSource, data: DataSection, tokenizer: PreTrainedTokenizerBase, *, pairs: bool = False) -> Survey:
    """Read all rows of a source with a path as a run does; of a stream, the first :data:`STREAMED_ROWS`.

    Args:
        pairs: its rows are pairs of a preferred and a rejected answer, each counted as one document.

    Raises:
        DataError: It is missing, unreadable, or has no column that its form needs.
    """
    skip = data.on_malformed == "skip"
    with memory_explained(source.label):
        opened = open_source(source, tokenizer, streaming=source.streaming, skip_damaged=skip, pairs=pairs)
        found = Survey(source, opened.reader.form.describe(), np.empty(0, np.int64), opened=opened)
        lengths: list[int] = []
        if source.streaming:
            for index, raw in enumerate(islice(rows_of(source, opened.open()), STREAMED_ROWS + 1)):
                found.cut_off = index == STREAMED_ROWS
                if found.cut_off:
                    break
                try:
                    lengths.append(_count(found, opened.reader.tokens(raw, tokenizer)))
                except MalformedRow as problem:
                    _note(found, f"{opened.reader.place(raw, index)}: {problem}")
        else:
            rows = tokenized(source, opened, tokenizer, data.num_workers)
            for length, targets, error in _columns(rows.with_format("arrow")):
                if length == MALFORMED:
                    _note(found, error)
                else:
                    lengths.append(_counted(found, length, targets))
        kept = np.array(lengths, dtype=np.int64)
        found.lengths = kept[kept >= MIN_TOKENS]
        found.empty = len(kept) - len(found.lengths)
    return found


def _columns(table: object) -> Iterator[tuple[int, int, str]]:
    """Length, learned tokens and fault of each row."""
    for batch in table.iter(batch_size=1000):  # type: ignore[attr-defined]
        for length, targets, error in zip(*(batch[name].to_pylist() for name in ("length", "targets", "error"))):
            yield length, sum(targets[1::2]) - sum(targets[::2]), error or ""


def _count(found: Survey, tokens: Tokens) -> int:
    return _counted(found, len(tokens.input_ids), sum(stop - start for start, stop in tokens.targets))


def _counted(found: Survey, length: int, learned: int) -> int:
    if length >= MIN_TOKENS:
        found.learned += learned
        found.without_target += not learned
    return length


def _note(found: Survey, example: str) -> None:
    """Count a row that cannot be read; ``example`` is its place and the reason."""
    # Turns and tokens differ from row to row, and the reason is the same.
    reason = re.sub(r"\d+", "N", example.partition(": ")[2])
    found.faults[reason] += 1
    found.examples.setdefault(reason, example)
