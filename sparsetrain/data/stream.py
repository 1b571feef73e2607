"""The endless stream of training rows: draw pieces from the mixture, pack them, and save an exact position."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from math import frexp, ldexp
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from sparsetrain.counted import counted
from sparsetrain.data.batch import Row
from sparsetrain.data.document import LongDocuments, Piece, Tokens
from sparsetrain.data.memory import memory_explained
from sparsetrain.data.packing import best_fit
from sparsetrain.data.position import Position, read_position
from sparsetrain.data.preview import describe_row, marked, preview, row_tokens
from sparsetrain.data.values import listed
from sparsetrain.errors import DataError
from sparsetrain.randomness import generator, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW_ROWS, MOST_ROWS, WINDOW_TOKENS = 32, 256, 2**19
"""Rows' worth of documents packed together: as many as hold so many tokens, from 32 to 256; 32 if no source is
shuffled, so that their order is kept. More fill rows better; fewer are quicker to draw again on resume."""
MOST_PIECES = 4096
"""Documents packed together at most, where they are so short that more would come before the first row."""
BARREN_DRAWS = 10_000
"""Draws in a row that may give no row before the stream gives up."""

_BY_SOURCE = ("pieces in each source", "tokens of each source")


class DocumentSource(Protocol):
    """A source of the mixture: an endless, resumable sequence of documents, cut into pieces that fit a row."""

    label: str
    chat: bool
    """Whether its rows go through the tokenizer's chat template."""

    @property
    def form(self) -> str:
        """A one-line description of how its rows are read."""

    @property
    def size(self) -> int | None:
        """Draws in an epoch: 0 for a synthetic source, which has none; None for a stream, which does not know."""

    @property
    def malformed(self) -> int:
        """Rows that could not be read, so far."""

    @property
    def content(self) -> str | None:
        """Equal for equal documents, wherever they lie; None for a synthetic source or a stream that cannot know."""

    def first(self) -> Tokens | None:
        """Its first document, whatever was drawn; None where none can be read."""

    def draw(self) -> list[Piece]:
        """The next piece; of a stream, all pieces of the next document."""

    def state_dict(self) -> dict[str, Any]:
        """Its position, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position."""


class RowCount(NamedTuple):
    """What some rows hold."""

    rows: int
    tokens: int
    by_source: Counter[str]
    """Tokens by the label of their source."""
    passes: dict[str, int]
    """Times that a stream was read to its end, and begun again, by its label."""


class RowStream:
    """An endless iterator over training rows, the same for every rank.

    The source of draw ``i`` is a function of ``seed`` and ``i``. Pieces are drawn and packed a window at a time: a
    window ends when its pieces make as many full rows as :data:`WINDOW_TOKENS` allows, and at the end of an epoch (when
    the mapped sources together have given as many pieces as they hold), so that an epoch is a whole number of rows.
    Within a window each piece, longest first, goes into the row that it fills best. The rows are shuffled if any source
    is, and otherwise in the order of their first pieces. Pieces without a target, such as a part of a long prompt, are
    left out: they would cost compute and change no weight.

    A state is the position at the start of a window and the row within it; resuming packs that window again.

    Args:
        sources: the mixture.
        weights: probability of each source, up to a factor.
        row_length: tokens in a full row.
        packing: fill rows with several documents; else one piece of a document a row.
        long_documents: what becomes of documents longer than a row.
        shuffle: shuffle the rows of a window.
        seed: seed of everything random.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        weights: Sequence[float],
        *,
        row_length: int,
        packing: bool,
        long_documents: LongDocuments,
        shuffle: bool,
        seed: int,
    ) -> None:
        self._sources = sources
        # Scaled by a power of two, which rounds nothing: sums of the largest numbers would overflow.
        scaled = [ldexp(weight, -frexp(max(weights))[1]) for weight in weights]
        self._shares = [total / sum(scaled) for total in accumulate(scaled)]
        self._row_length = row_length
        self._packing = packing
        self._long_documents = long_documents
        self._shuffle = shuffle
        most = WINDOW_TOKENS // row_length if shuffle else 0
        self._window_rows = min(MOST_ROWS, max(WINDOW_ROWS, most))
        self._seed = seed
        self._epoch = sum(source.size or 0 for source in sources)
        self._draws = 0
        self._mapped_draws = 0
        self.given = 0
        """Rows given since the beginning, in all runs."""
        self._window: list[list[Piece]] = []
        self._row = 0
        self._window_start = self._position()
        self._beginning = self.state_dict()

    def __iter__(self) -> RowStream:
        return self

    def __next__(self) -> Row:
        """The next row.

        Raises:
            DataError: a row of a streaming source cannot be read, or no document gives a row any more.
        """
        return _row_of(self._advance())

    def skip(self) -> None:
        """Pass over the next row; mapped sources do not even read it."""
        self._advance()

    def preview(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Log lines that describe how each source is read, with its first document, and the first rows."""
        lines = [line for each in self._sources for line in preview(each.label, each.form, each.first(), tokenizer)]
        window, row = self._ahead(), self.first()
        share = sum(piece.length for pieces in window for piece in pieces) / (len(window) * self._row_length)
        packed = counted(len(window), "row")
        how = "" if self._packing else ", as each holds one document (sequence.packing: false)"
        return [
            *lines,
            f"data: first row: {describe_row(row)}: {marked(row_tokens(row), tokenizer)}",
            f"data: {packed} of {self._row_length:,} tokens packed together: {share:.1%} full{how}",
        ]

    def first(self) -> Row:
        """The next row, which is given all the same."""
        return _row_of(self._ahead()[0])

    def first_text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole text of the next row, with learned spans between « and »."""
        return marked(row_tokens(self.first()), tokenizer, whole=True)

    def _ahead(self) -> list[list[Piece]]:
        """The rows of this window that were not given yet; those of the next one if all were."""
        if self._row == len(self._window):
            self._window_start = self._position()
            self._window, self._row = self._pack(), 0
        return self._window[self._row :]

    @property
    def chat(self) -> bool:
        """Whether rows of any source go through the tokenizer's chat template."""
        return any(source.chat for source in self._sources)

    @property
    def malformed(self) -> dict[str, int]:
        """Malformed rows skipped so far, by source."""
        counts: Counter[str] = Counter()
        for source in self._sources:
            counts[source.label] += source.malformed
        return dict(counts)

    def state_dict(self) -> dict[str, Any]:
        """The position before the next row, JSON-able and independent of the number of ranks."""
        return {"mixture": self._mixture(), "row": self._row, **self._window_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position.

        Raises:
            DataError: it was saved by another mixture, row length or seed, where it would mean other rows.
            ValueError: it is no position of any.
        """
        saved = read_position(state, Position)
        mine, theirs = self._mixture(), saved.mixture
        changed = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if changed:
            if mine.keys() != theirs.keys():
                raise DataError(
                    "the data position to resume from is of another version of sparsetrain, whose rows were packed "
                    "otherwise; resume with that version, or start a new run from this one: model.path=RUN/final"
                )
            if changed[0] in _BY_SOURCE and (other := self._other_sources(mine[changed[0]], theirs.get(changed[0]))):
                raise DataError(
                    f"the rows of data source {listed(other)} differ from those that this run was trained on "
                    f"({changed[0]} {theirs.get(changed[0])}, now {mine.get(changed[0])}); restore the data of that "
                    "run to resume it, or start a new run with the new data"
                )
            raise DataError(
                f"the data position to resume from was saved with {changed[0]} {theirs.get(changed[0])}, and the "
                f"recipe now gives {mine.get(changed[0])}; resume with the recipe and the data of that run"
            )
        saved.check(len(self._sources))
        self.given, self._draws, self._mapped_draws = saved.rows, saved.draws, saved.mapped_draws
        for source, position in zip(self._sources, saved.sources, strict=True):
            source.load_state_dict(position)
        self._window_start = self._position()
        self._window, self._row = [], saved.row
        self.given += saved.row
        if self._row:
            self._window = self._pack()
        if self._row > len(self._window):
            raise ValueError(f"row {self._row} of {len(self._window)} that were packed together")

    def rows_per_epoch(self) -> int:
        """Rows of the first epoch, counted by packing it. The order of later epochs may make a row more or less.

        Raises:
            DataError: a source streams, or all are synthetic: there is no end to count to.
        """
        if not self._epoch or any(source.size is None for source in self._sources):
            raise DataError(
                "epochs can only be counted over mapped sources; with a streaming source, or synthetic ones alone, "
                "set train.steps or train.tokens instead of train.epochs"
            )
        return self.count().rows

    def count(self, most: int | None = None) -> RowCount:
        """What the first rows hold: those of the first epoch, or the windows that have ``most`` rows, if that is less.

        ``most`` is needed where :meth:`rows_per_epoch` cannot count.
        """
        here = self.state_dict()
        self.load_state_dict(self._beginning)
        count = RowCount(0, 0, Counter(), {})
        while not (self._epoch and self._mapped_draws >= self._epoch) and (most is None or count.rows < most):
            for row in self._pack():
                for piece in row:
                    count.by_source[piece.source] += piece.length
                count = count._replace(rows=count.rows + 1, tokens=count.tokens + sum(piece.length for piece in row))
        streams = [source for source in self._sources if source.size is None]
        count = count._replace(passes={source.label: source.state_dict()["passes"] for source in streams})
        self.load_state_dict(here)
        return count

    def _advance(self) -> list[Piece]:
        self._ahead()
        self._row += 1
        self.given += 1
        # Not kept: tokens of a piece are read once and stay with it.
        row, self._window[self._row - 1] = self._window[self._row - 1], []
        return row

    def _pack(self) -> list[list[Piece]]:
        """Draw the documents of the next window and lay their pieces into rows."""
        start = self._draws
        drawn_pieces: list[Piece] = []
        tokens = barren = 0
        while True:
            drawn, epoch_ends = self._draw()
            pieces = [piece for piece in drawn if piece.useful]
            barren = 0 if pieces else barren + 1
            if barren == BARREN_DRAWS:
                last = f", the last of them {drawn[0].origin}" if drawn else ""
                raise DataError(
                    f"the last {barren:,} draws gave no row{last}: with data.long_documents="
                    f"{self._long_documents}, none has anything to learn within "
                    f"sequence.length={self._row_length} tokens"
                )
            drawn_pieces += pieces
            tokens += sum(piece.length for piece in pieces)
            full = tokens >= self._window_rows * self._row_length or len(drawn_pieces) >= MOST_PIECES
            if drawn_pieces and (epoch_ends or full):
                break
        lengths = [piece.length for piece in drawn_pieces]
        laid = best_fit(lengths, self._row_length) if self._packing else [[place] for place in range(len(lengths))]
        rows = [[drawn_pieces[place] for place in row] for row in laid]
        if self._shuffle:
            rows = [rows[i] for i in generator(self._seed, "rows", start).permutation(len(rows))]
        return rows

    def _draw(self) -> tuple[list[Piece], bool]:
        """The next draw from the mixture, and whether an epoch ends with it."""
        choice = 0
        if len(self._sources) > 1:
            drawn = uniform(self._seed, "mixture", self._draws)
            choice = min(bisect_right(self._shares, drawn), len(self._sources) - 1)
        source = self._sources[choice]
        self._draws += 1
        self._mapped_draws += bool(source.size)
        with memory_explained(source.label):
            pieces = source.draw()
        return pieces, bool(source.size) and self._mapped_draws % self._epoch == 0

    def _other_sources(self, mine: list[Any], theirs: Any) -> list[str]:
        if not isinstance(theirs, list) or len(theirs) != len(mine):
            return []
        return [source.label for source, now, then in zip(self._sources, mine, theirs) if now != then]

    def _position(self) -> dict[str, Any]:
        return {
            "rows": self.given,
            "draws": self._draws,
            "mapped_draws": self._mapped_draws,
            "sources": [source.state_dict() for source in self._sources],
        }

    def _mixture(self) -> dict[str, Any]:
        """The settings that determine which rows a position refers to, under their names in the recipe."""
        return {
            "train.seed": self._seed,
            "sequence.length": self._row_length,
            "sequence.packing": self._packing,
            "rows packed together": self._window_rows,
            "data.long_documents": self._long_documents,
            _BY_SOURCE[0]: [source.size for source in self._sources],
            _BY_SOURCE[1]: [source.content for source in self._sources],
            "cumulative weights": self._shares,
        }


def _row_of(pieces: list[Piece]) -> Row:
    with memory_explained(pieces[0].origin):
        return Row(
            input_ids=np.concatenate([piece.input_ids() for piece in pieces]),
            labels=np.concatenate([piece.labels() for piece in pieces]),
            lengths=[length for piece in pieces for length in piece.lengths],
            origin=[piece.origin for piece in pieces for _ in piece.lengths],
        )
