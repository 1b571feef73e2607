"""Windows over held-out text: which tokens are read together, and which of them are scored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsetrain.data.batch import IGNORE, Row
from sparsetrain.data.tokens import HeldOut
from sparsetrain.evaluation.journal import digest
from sparsetrain.evaluation.scoring import CHUNK


class Window(NamedTuple):
    """Tokens ``start`` to ``stop`` of the text, scored from ``first`` on."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Scored:
    """The windows of one row, without their tokens, which are many times the text where windows overlap."""

    length: int
    """Tokens of a window."""
    windows: list[Window]
    content: str
    """A digest of the tokens and labels."""


class Windows:
    """Windows of ``length`` tokens over a text, each of whose tokens is scored at most once.

    Of the first window of a stretch all tokens are scored that a token precedes. With a stride the following windows
    begin ``stride`` tokens later, and only their new tokens are scored; without one they begin where the last ended,
    and all of their tokens are scored but the first, unless BOS precedes it.

    Args:
        text: the tokens.
        length: tokens of a window, with its BOS. The last of a stretch may be shorter.
        stride: at most ``length``, without BOS.
        bos: put before every window.
        stretches: windows begin anew with each of these parts of the text, first and last place; None is all of it.
        row_tokens: as many windows share a row as fit into so many tokens.
        behind: of every window only tokens with so many tokens before them are scored.
    """

    def __init__(
        self,
        text: HeldOut,
        length: int,
        stride: int | None = None,
        *,
        bos: int | None = None,
        stretches: Sequence[tuple[int, int]] | None = None,
        row_tokens: int = 0,
        behind: int = 0,
    ) -> None:
        self.text, self.length, self.bos = text, length, bos
        self._behind = max(behind, 1)
        self._prefix = np.array([] if bos is None else [bos], dtype=np.int64)
        parts = [(0, len(text.input_ids))] if stretches is None else stretches
        windows = [window for first, last in parts for window in self._cut(first, last, stride)]
        kept = [(window, places) for window in windows if len(places := self._places(window))]
        self.kept = [window for window, _ in kept]
        """Windows with a token to score."""
        self.scored = np.concatenate([places for _, places in kept] or [np.array([], dtype=np.int64)])
        """int64 ``[n]``: the places in the text of the tokens that are scored, ascending."""
        before = [places - window.start + len(self._prefix) for window, places in kept]
        self.context = np.concatenate(before or [np.array([], dtype=np.int64)])
        """int64 ``[n]``: the tokens before each of them in its window, BOS included."""
        fit = max(1, row_tokens // length)
        groups = [self.kept[start : start + fit] for start in range(0, len(kept), fit)]
        self.rows: list[Scored] = []
        self.num_chunks = 1
        """Chunks of logits of each row."""
        for group in groups:
            row = self.row(group)
            self.rows.append(Scored(length, group, digest([row.input_ids, row.labels])))
            self.num_chunks = max(self.num_chunks, math.ceil((row.labels != IGNORE).sum() / CHUNK))

    def _cut(self, first: int, last: int, stride: int | None) -> Iterator[Window]:
        room = self.length - len(self._prefix)
        start = scored = first
        while scored < last:
            stop = min(start + room, last)
            yield Window(start, stop, scored)
            start, scored = start + (stride or room), stop

    def _places(self, window: Window) -> np.ndarray:
        """The places in the text of the tokens of a window that are scored."""
        first = max(window.first, window.start + self._behind - len(self._prefix))
        return first + np.flatnonzero(self.text.targets[first : window.stop])

    def row(self, group: Sequence[Window]) -> Row:
        """A row of windows, labelled on the tokens that are scored."""
        ids, labels = [], []
        for window in group:
            tokens = np.concatenate([self._prefix, self.text.input_ids[window.start : window.stop]])
            scored = np.full_like(tokens, IGNORE)
            inside = self._places(window) - window.start + len(self._prefix)
            scored[inside] = tokens[inside]
            ids.append(tokens)
            labels.append(scored)
        lengths = [len(tokens) for tokens in ids]
        return Row(np.concatenate(ids), np.concatenate(labels), lengths, [""] * len(lengths))
