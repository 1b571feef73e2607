"""Streaming sources: read and tokenised during training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from sparsetrain.data.content import content_of_files
from sparsetrain.data.document import MIN_TOKENS, Document, Piece, Tokens, cut
from sparsetrain.data.position import Streamed, read_position
from sparsetrain.data.sources import files_of, open_source, rows_of
from sparsetrain.data.values import MalformedRow, fix_or_skip
from sparsetrain.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import DataSection
    from sparsetrain.source_section import DataSource

logger = logging.getLogger(__name__)

NAMED_ROWS = 3
"""Malformed rows named in the log; the others are counted."""
FIRST_ROWS = 20
"""Rows looked at for a first document to show."""
BARREN_DOCUMENTS = 200
"""Documents in a row of which no piece is worth a place in a row, before the source is refused."""


class StreamedSource:
    """The documents of a streaming source in the order of its rows, from the beginning again at each end.

    The state holds that of the ``datasets`` stream, which finds its place again without reading what came before
    where the format allows.

    Raises:
        DataError: the source is missing, unreadable or empty.
    """

    size = None

    def __init__(
        self,
        source: DataSource,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        row_length: int,
        *,
        pairs: bool = False,
    ) -> None:
        self.label = source.label
        self.malformed = 0
        """Malformed rows met in the first pass."""
        self._source = source
        self._stop = data.on_malformed == "stop"
        self._tokenizer = tokenizer
        self._cut = (row_length, data.long_documents)
        self._opened = open_source(source, tokenizer, streaming=True, skip_damaged=not self._stop, pairs=pairs)
        self.chat = self._opened.reader.chat
        self._dataset: Any = None
        self._used_up = True
        """Whether the dataset cannot begin anew: one that was resumed would start its next pass there again."""
        self._resumed: dict[str, Any] | None = None
        """State of the dataset as loaded; the dataset itself only knows it once a row is read."""
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._passes = 0
        """Passes completed."""
        self._row = 0
        """Rows of this pass read so far."""
        self._documents = 0
        """Documents that they gave."""
        self._barren: list[int] = []
        """The latest rows without a piece that is worth a place in a row."""
        self._rewind()

    @cached_property
    def content(self) -> str | None:
        """Equal for local files that look the same: their sizes, and a sample of each. None for a Hub dataset."""
        files = files_of(self._source)
        return None if files is None else content_of_files(files)

    @property
    def form(self) -> str:
        """A description of how its rows are read."""
        return self._opened.reader.form.describe()

    def first(self) -> Tokens | None:
        """The first document of the source, if one of its first rows gives one."""
        for raw in islice(rows_of(self._source, self._opened.open()), FIRST_ROWS):
            with suppress(MalformedRow):
                tokens = self._opened.reader.tokens(raw, self._tokenizer)
                if len(tokens.input_ids) >= MIN_TOKENS:
                    return tokens
        return None

    def draw(self) -> list[Piece]:
        """The pieces of the next document.

        Raises:
            DataError: a row is malformed and the recipe says stop, reading failed, a whole pass gave no document, or
                many documents one after another have nothing to learn within a row.
        """
        while True:
            raw = next(self._rows, None)
            self._resumed = None
            if raw is None:
                if not self._documents:
                    raise DataError(
                        f"data source {self.label!r} is empty: none of its rows ({self._row}) gives a document"
                    )
                self._passes += 1
                self._rewind()
                continue
            row, self._row = self._row, self._row + 1
            try:
                tokens = self._opened.reader.tokens(raw, self._tokenizer)
            except MalformedRow as problem:
                self._report(f"data source {self.label!r}: {self._opened.reader.place(raw, row)}: {problem}")
                continue
            if len(tokens.input_ids) >= MIN_TOKENS:
                self._documents += 1
                pieces = cut(Document.of(f"{self.label}:{row}", tokens), *self._cut)
                self._count_barren(row, any(piece.useful for piece in pieces))
                return pieces

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream."""
        return {
            "passes": self._passes,
            "row": self._row,
            "documents": self._documents,
            "malformed": self.malformed,
            "dataset": self._resumed or (self._dataset.state_dict() if self._row else None),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream stood."""
        saved = read_position(state, Streamed)
        self._rewind()
        self._passes, self._row = saved.passes, saved.row
        self._documents, self.malformed = saved.documents, saved.malformed
        self._resumed = saved.dataset
        if self._resumed is not None:
            self._used_up = True
            try:
                self._dataset.load_state_dict(deepcopy(self._resumed))
            except Exception as error:  # the library trusts it
                raise ValueError(f"the position in {self.label!r} is none ({first_line(error)})") from error

    def _count_barren(self, row: int, useful: bool) -> None:
        """Give up early: each document is tokenised again and again for nothing."""
        self._barren = [] if useful else [*self._barren, row]
        if len(self._barren) == BARREN_DOCUMENTS:
            length, long_documents = self._cut
            named = ", ".join(f"row {each}" for each in self._barren[:NAMED_ROWS])
            raise DataError(
                f"data source {self.label!r}: {BARREN_DOCUMENTS} documents in a row give nothing to train on ({named}, "
                f"...): they are longer than sequence.length={length}, and with data.long_documents={long_documents} "
                "nothing that is learned is left of them, as where a prompt fills a row; raise sequence.length, "
                "shorten the prompts, or set data.long_documents=split"
            )

    def _rewind(self) -> None:
        # Opening takes longer than reading a short file, which packing may pass through a thousand times for a row.
        if self._used_up:
            self._dataset, self._used_up = self._opened.open(), False
        self._rows = rows_of(self._source, self._dataset)
        self._row = self._documents = 0

    def _report(self, message: str) -> None:
        if self._stop:
            raise DataError(f"{message}. {fix_or_skip('the row')}")
        if self._passes:
            return
        self.malformed += 1
        if self.malformed <= NAMED_ROWS:
            logger.warning("%s (skipped%s)", message, "; more are only counted" if self.malformed == NAMED_ROWS else "")
