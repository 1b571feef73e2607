"""A tokenised document and the pieces of it that go into rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

IGNORE = -100
"""Label of a token without loss."""

LongDocuments = Literal["split", "truncate", "drop"]

MIN_TOKENS = 2
"""Minimum length of a piece: a shorter one has no token to predict."""


class Tokens(NamedTuple):
    """The tokens of a document, and the spans with loss."""

    input_ids: np.ndarray
    """Integers ``[n]``."""
    targets: list[tuple[int, int]]
    """Half-open spans of tokens with loss, in ascending order."""


class PairTokens(Tokens):
    """The tokens of a preferred answer behind its prompt, and behind them those of the rejected one behind the same.

    Args:
        rejected_from: Where the second document begins.
    """

    rejected_from: int

    def __new__(cls, input_ids: np.ndarray, targets: list[tuple[int, int]], rejected_from: int) -> PairTokens:
        made = super().__new__(cls, input_ids, targets)
        made.rejected_from = rejected_from
        return made


class Document:
    """A document with known length, whose tokens are read when first needed.

    Args:
        origin: Its name, ``source:row``.
        length: Number of tokens.
        read: Returns the tokens.
    """

    def __init__(self, origin: str, length: int, read: Callable[[], Tokens]) -> None:
        self.origin = origin
        self.length = length
        self._read = read

    @classmethod
    def of(cls, origin: str, tokens: Tokens) -> Document:
        """A document that has been read already."""
        return cls(origin, len(tokens.input_ids), lambda: tokens)

    @cached_property
    def tokens(self) -> Tokens:
        """The tokens, read once."""
        return self._read()


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of a document."""

    document: Document
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document in it: two of a pair, which is never cut."""
        tokens = self.document.tokens
        if isinstance(tokens, PairTokens):
            return [tokens.rejected_from, self.length - tokens.rejected_from]
        return [self.length]

    @property
    def origin(self) -> str:
        """Name of the document, with the first token where this is not its beginning."""
        return f"{self.document.origin}@{self.start}" if self.start else self.document.origin

    @property
    def source(self) -> str:
        """Label of the document's source."""
        return self.document.origin.rpartition(":")[0]

    @property
    def whole(self) -> bool:
        """Whether this is all of the document."""
        return self.length == self.document.length

    @property
    def has_target(self) -> bool:
        """Whether any token except the first, which cannot be predicted, has loss."""
        return any(max(first, self.start + 1) < min(last, self.stop) for first, last in self.document.tokens.targets)

    @property
    def useful(self) -> bool:
        """Whether it should be put into a row: a piece without targets would cost compute without training."""
        return self.whole or self.has_target

    def input_ids(self) -> np.ndarray:
        """int64 ``[length]``."""
        return self.document.tokens.input_ids[self.start : self.stop].astype(np.int64)

    def labels(self) -> np.ndarray:
        """int64 ``[length]``; ``-100`` at the first token and at tokens without loss."""
        input_ids = self.input_ids()
        labels = np.full_like(input_ids, IGNORE)
        for first, last in self.document.tokens.targets:
            span = slice(max(first - self.start, 1), max(last - self.start, 1))
            labels[span] = input_ids[span]
        return labels


def count_pieces(lengths: np.ndarray, row_length: int, long_documents: LongDocuments) -> np.ndarray:
    """The number of pieces that :func:`cut` makes of documents of these lengths, integers ``[n]`` to ``[n]``."""
    long = {"split": -(-lengths // row_length), "truncate": np.ones_like(lengths), "drop": np.zeros_like(lengths)}
    return np.where(lengths <= row_length, 1, long[long_documents])


def cut(document: Document, row_length: int, long_documents: LongDocuments) -> list[Piece]:
    """The pieces of a document that go into rows of ``row_length`` tokens.

    A document that fits into a row is never cut: a question must not lose its context. A longer one is cut into full
    rows and a remainder (``split``), truncated to its first row (``truncate``), or dropped (``drop``).
    """
    if document.length <= row_length:
        return [Piece(document, 0, document.length)]
    if long_documents == "drop":
        return []
    if long_documents == "truncate":
        return [Piece(document, 0, row_length)]
    edges = [*range(0, document.length, row_length), document.length]
    if edges[-1] - edges[-2] < MIN_TOKENS:
        edges[-2] -= 1
    return [Piece(document, start, stop) for start, stop in pairwise(edges)]
