"""Mapped sources: tokenised once, cached, and read in random order."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from filelock import FileLock

from sparsetrain.cache_folder import cache_fault
from sparsetrain.data.content import content_of
from sparsetrain.data.document import MIN_TOKENS, Document, PairTokens, Piece, Tokens, count_pieces, cut
from sparsetrain.data.encoding import tokenizer_fingerprint
from sparsetrain.data.position import Drawn, read_position
from sparsetrain.data.render import RENDER_VERSION
from sparsetrain.data.sources import OpenSource, Reader, open_source
from sparsetrain.data.values import MalformedRow, fix_or_skip
from sparsetrain.errors import DataError, first_line
from sparsetrain.randomness import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import DataSection
    from sparsetrain.source_section import DataSource

logger = logging.getLogger(__name__)

MALFORMED = -1
"""Length recorded for a row that cannot be read."""
NAMED_ROWS = 3
"""Malformed rows named in messages; the others are counted."""
ROWS_AT_ONCE = 64
"""Rows tokenised before they are written; book-length rows must fit in memory that many times."""

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "targets": datasets.List(datasets.Value("int32")),
        "rejected_from": datasets.Value("int64"),
        "length": datasets.Value("int64"),
        "error": datasets.Value("string"),
    }
)


def tokenize_rows(
    batch: dict[str, list[Any]], indices: list[int], *, tokenizer: PreTrainedTokenizerBase, reader: Reader
) -> dict[str, list[Any]]:
    """Tokenise a batch of raw rows; a row that cannot be read gets an ``error`` and no tokens."""
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for position, index in enumerate(indices):
        raw = {name: values[position] for name, values in batch.items()}
        try:
            tokens = reader.tokens(raw, tokenizer)
            length, error = len(tokens.input_ids), None
        except MalformedRow as problem:
            tokens = Tokens(np.empty(0, np.int32), [])
            length, error = MALFORMED, f"{reader.place(raw, index)}: {problem}"
        except MemoryError as problem:
            raise MemoryError(f"{reader.place(raw, index)}: {first_line(problem)}") from problem
        columns["input_ids"].append(tokens.input_ids)
        columns["targets"].append([edge for span in tokens.targets for edge in span])
        columns["rejected_from"].append(tokens.rejected_from if isinstance(tokens, PairTokens) else None)
        columns["length"].append(length)
        columns["error"].append(error)
    return columns


class MappedSource:
    """The documents of a source that is tokenised once, each epoch in a new seeded order.

    A document longer than a row is drawn piece by piece, in no particular order: otherwise one long book would fill
    batch after batch.

    Args:
        source, data: The source and the ``data`` section.
        row_length: tokens in a full row.
        seed, index: what the order depends on, ``index`` being the source's place in the mixture.
        pairs: its rows are pairs of a preferred and a rejected answer.

    Raises:
        DataError: the source is missing or empty, or has malformed rows where the recipe says stop.
    """

    def __init__(
        self,
        source: DataSource,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        row_length: int,
        seed: int,
        index: int,
        *,
        pairs: bool = False,
    ) -> None:
        self.label = source.label
        stop = data.on_malformed == "stop"
        opened = open_source(source, tokenizer, streaming=False, skip_damaged=not stop, pairs=pairs)
        self.chat = opened.reader.chat
        self.form = opened.reader.form.describe()
        self._rows = tokenized(source, opened, tokenizer, data.num_workers).with_format("numpy")
        self._tables = self._rows.with_format("arrow")
        lengths = self._rows["length"][:]
        malformed = np.flatnonzero(lengths == MALFORMED)
        self.malformed = len(malformed)
        if self.malformed:
            self._report(malformed, len(lengths), stop=stop)
        self._usable = np.flatnonzero(lengths >= MIN_TOKENS)
        self.lengths: np.ndarray = lengths[self._usable]
        """Tokens of each document."""
        if not len(self._usable):
            raise DataError(f"data source {self.label!r} is empty: none of its rows ({len(lengths)}) gives a document")
        self._cut = (row_length, data.long_documents)
        self._pieces_up_to = np.cumsum(count_pieces(self.lengths, *self._cut))
        if not self.size:
            raise DataError(
                f"data source {self.label!r}: data.long_documents=drop leaves nothing of it, since all of its "
                f"documents are longer than sequence.length={row_length}"
            )
        if data.long_documents == "truncate" and not self._any_learned():
            raise DataError(
                f"data source {self.label!r}: all of its documents are longer than sequence.length={row_length}, and "
                "with data.long_documents=truncate nothing that is learned is left of them, as where a prompt fills a "
                "row; raise sequence.length, shorten the prompts, or set data.long_documents=split"
            )
        if empty := len(lengths) - self.malformed - len(self._usable):
            what = "pairs with equal answers" if pairs else "rows that are empty or have nothing selected to learn"
            logger.info("data source %r: %s left out: %d", self.label, what, empty)
        self._shuffle = source.shuffle
        self._seed = (seed, "order", index)
        self._order = (-1, self._usable)
        self._drawn = 0

    @property
    def size(self) -> int:
        """Pieces in an epoch: documents, or the parts of longer ones."""
        return int(self._pieces_up_to[-1])

    @cached_property
    def content(self) -> str:
        """Equal for equal documents, wherever they lie."""
        return content_of(self._rows, self._usable, self.lengths)

    def first(self) -> Tokens:
        """The first document of the source."""
        return self._read(int(self._usable[0]))

    def draw(self) -> list[Piece]:
        """The next piece of this epoch, or the first of the next one."""
        epoch, place = divmod(self._drawn, self.size)
        if self._shuffle and self._order[0] != epoch:
            self._order = (epoch, generator(*self._seed, epoch).permutation(self.size))
        number = int(self._order[1][place]) if self._shuffle else place
        self._drawn += 1
        index = int(np.searchsorted(self._pieces_up_to, number, side="right"))
        pieces = self._pieces(index)
        first = int(self._pieces_up_to[index]) - len(pieces)
        return [pieces[number - first]]

    def _pieces(self, index: int) -> list[Piece]:
        row = int(self._usable[index])
        return cut(Document(f"{self.label}:{row}", int(self.lengths[index]), lambda: self._read(row)), *self._cut)

    def _any_learned(self) -> bool:
        """Whether a document ends within a row, or the first row of a longer one has anything to learn."""
        if (self.lengths <= self._cut[0]).any():
            return True
        return any(piece.useful for index in range(len(self.lengths)) for piece in self._pieces(index))

    def state_dict(self) -> dict[str, Any]:
        """The number of pieces drawn in all epochs."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the pieces drawn."""
        self._drawn = read_position(state, Drawn).drawn

    def _read(self, row: int) -> Tokens:
        """The tokens of a row as a view of the cache, so that the pieces of a long document do not copy it."""
        table = self._tables[row]
        input_ids, targets = (np.asarray(table[name].chunk(0).flatten()) for name in ("input_ids", "targets"))
        spans = [(int(start), int(stop)) for start, stop in targets.reshape(-1, 2)]
        middle = table["rejected_from"][0].as_py()
        return Tokens(input_ids, spans) if middle is None else PairTokens(input_ids, spans, middle)

    def _report(self, malformed: np.ndarray, rows: int, *, stop: bool) -> None:
        named = "; ".join(str(self._rows[int(row)]["error"]) for row in malformed[:NAMED_ROWS])
        message = (
            f"data source {self.label!r}: {len(malformed)} of {rows} rows cannot be read: {named}"
            f"{'; ...' if len(malformed) > NAMED_ROWS else ''}"
        )
        if stop:
            raise DataError(f"{message}. {fix_or_skip('them')}")
        logger.warning("%s", message)


def tokenized(
    source: DataSource, opened: OpenSource, tokenizer: PreTrainedTokenizerBase, num_workers: int
) -> datasets.Dataset:
    """The rows of a source, tokenised or taken from the cache.

    The cache is keyed by the rows, the tokenizer's content, the form and the version of our rendering.
    """
    rows = opened.open()
    identity = (rows._fingerprint, tokenizer_fingerprint(tokenizer), opened.reader, RENDER_VERSION)
    fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    processes = min(num_workers, len(rows))
    # One rank of a machine tokenises; the others wait and read what it wrote.
    try:
        with FileLock(Path(datasets.config.HF_DATASETS_CACHE) / f"sparsetrain-{fingerprint}.lock"):
            return rows.map(
                tokenize_rows,
                batched=True,
                with_indices=True,
                batch_size=ROWS_AT_ONCE,
                writer_batch_size=ROWS_AT_ONCE,
                remove_columns=rows.column_names,
                features=FEATURES,
                fn_kwargs={"tokenizer": tokenizer, "reader": opened.reader},
                num_proc=processes if processes > 1 else None,
                new_fingerprint=fingerprint,
                desc=f"tokenising {source.label}",
            )
    except OSError as problem:
        if (fault := cache_fault(problem, (str(datasets.config.HF_DATASETS_CACHE),))) is None:
            raise
        raise DataError(f"data source {source.label!r}: {fault}") from problem
