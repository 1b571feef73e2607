"""Open a data source with Hugging Face ``datasets``, and determine the form of its rows."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
from datasets import packaged_modules

from sparsetrain.cache_folder import cache_fault
from sparsetrain.data.files import (
    Kind,
    Stamped,
    find_files,
    is_local,
    read_documents,
    read_lines,
    stamped,
    stdlib_files,
)
from sparsetrain.data.forms import RowForm, resolve_form, takes_template
from sparsetrain.data.local_rows import (
    ROWS_TRIED,
    STDLIB,
    Layout,
    fields_of,
    layout_of,
    local_files,
    refuse_hub_settings,
)
from sparsetrain.data.memory import out_of_memory
from sparsetrain.data.render import render
from sparsetrain.data.row_choice import chosen_rows
from sparsetrain.data.shards import check_alike, check_kinds, intact, with_rows
from sparsetrain.data.table_files import TableFiles
from sparsetrain.data.turn_names import FIRST_ROWS, check_turn_names
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError
from sparsetrain.hub import read_cache_if_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.data.document import Tokens
    from sparsetrain.source_section import DataSource

logger = logging.getLogger(__name__)

datasets.utils.logging.set_verbosity_error()
if not sys.stderr.isatty():
    datasets.disable_progress_bars()


@dataclass(frozen=True)
class Reader:
    """Reads and names raw rows. Small and picklable, as it is sent to tokenisation workers."""

    layout: Layout
    form: RowForm
    chat: bool
    """Whether rows go through the tokenizer's chat template."""
    tables: TableFiles | None = field(default=None, repr=False, compare=False)
    """The local tables that rows are in. Not a part of what decides tokens, which is what names a cache."""

    def place(self, raw: Mapping[str, Any], index: int) -> str:
        """The place of a row: its file and line, or its number in a table."""
        if self.layout != "table":
            return str(raw["place"])
        return f"row {index}" if self.tables is None else self.tables.place(index)

    def tokens(self, raw: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokens:
        """The tokens of a raw row.

        Raises:
            MalformedRow: it cannot be read.
        """
        return render(fields_of(raw, self.layout), self.form, tokenizer)


_Opened: TypeAlias = tuple[Layout, Callable[[], Any], TableFiles | None]
"""The layout of a source's rows, what gives them, and the local tables that they are in."""


@dataclass(frozen=True)
class OpenSource:
    """A source whose rows can be read."""

    open: Callable[[], datasets.Dataset | datasets.IterableDataset]
    """Gives the rows from the beginning."""
    reader: Reader


def open_source(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    streaming: bool,
    skip_damaged: bool = False,
    pairs: bool = False,
) -> OpenSource:
    """Open a source of rows: local files, the standard library, or a Hub dataset.

    Args:
        streaming: give a ``datasets.IterableDataset`` that reads rows as they are asked for; else a ``Dataset``.
        skip_damaged: leave out local parquet and arrow files that are damaged; else refuse them. Of a streaming
            source, only files that were cut are found before they are read.
        pairs: its rows are pairs of a preferred and a rejected answer.

    Raises:
        DataError: it is missing, unreadable, empty, or has no column that its form needs.
    """
    layout, opened, tables = _opened(source, streaming, skip_damaged)

    def opened_rows() -> Any:
        return chosen_rows(source, opened())

    row = _first_row(source, opened_rows(), layout)
    form = resolve_form(source, list(row), tokenizer, pairs=pairs)
    if tables is not None:
        check_kinds(source.label, tables.kind, tables.files, {*form.unread, *form.ignore})
    # Not only the chosen rows: a part that is held out may lack what is rare.
    rows = _readable(rows_of(source, opened()), layout)
    if warning := check_turn_names(source, form, rows, most=FIRST_ROWS if streaming else None):
        logger.warning("%s", warning)
    return OpenSource(opened_rows, Reader(layout, form, takes_template(form, row, tokenizer), tables))


def columns_of(source: DataSource) -> Iterator[Mapping[str, Any]]:
    """The columns of every row, as they are.

    Raises:
        DataError: the source is missing, unreadable or empty, or a row is no JSON object.
    """
    layout, opened, _ = _opened(source, _is_on_disk(source), False)
    empty = True
    for raw in rows_of(source, opened()):
        empty = False
        try:
            yield fields_of(raw, layout)
        except MalformedRow as malformed:
            raise DataError(f"data source {source.label!r}: {raw['place']}: {malformed}") from malformed
    if empty:
        raise _empty(source)


def rows_of(source: DataSource, rows: datasets.Dataset | datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The raw rows; errors of the library become :class:`DataError`."""
    try:
        yield from rows
    except Exception as problem:
        _name_damage(source)
        raise _unreadable(source, problem) from problem


def _readable(rows: Iterable[Mapping[str, Any]], layout: Layout) -> Iterator[Mapping[str, Any]]:
    """The columns of the raw rows that can be read."""
    for raw in rows:
        with suppress(MalformedRow):
            yield fields_of(raw, layout)


def _is_on_disk(source: DataSource) -> bool:
    assert source.path is not None
    return source.path == STDLIB or is_local(source.path)


def _name_damage(source: DataSource) -> None:
    """Raise a :class:`DataError` that names the damaged file and row of a local table, if there is one."""
    assert source.path is not None
    if _is_on_disk(source) and source.path != STDLIB:
        kind, files = find_files(source.label, source.path)
        if kind in ("parquet", "arrow"):
            intact(source.label, kind, files, skip=False, whole=True)
            check_alike(source.label, kind, files)


def files_of(source: DataSource) -> list[str] | None:
    """The files of a source; None of a Hub dataset.

    Raises:
        DataError: there are none, or they are of no kind that is read.
    """
    if not _is_on_disk(source):
        return None
    return stdlib_files(source.label, source.split) if source.path == STDLIB else local_files(source)[1]


def _opened(source: DataSource, streaming: bool, skip_damaged: bool) -> _Opened:
    return _local(source, streaming, skip_damaged) if _is_on_disk(source) else _hub(source, streaming)


def _local(source: DataSource, streaming: bool, skip_damaged: bool) -> _Opened:
    assert source.path is not None
    kind: Kind
    if source.path == STDLIB:
        refuse_hub_settings(source)
        kind, files = "documents", stdlib_files(source.label, source.split)
    else:
        kind, files = local_files(source)
    if kind in ("parquet", "arrow"):
        files = with_rows(source.label, kind, intact(source.label, kind, files, skip=skip_damaged, whole=False))
        tables = TableFiles(source, kind, files)
        return "table", _table(tables, streaming, skip_damaged), tables
    layout = layout_of(kind)
    return layout, lambda: _generated(source, layout, stamped(files), streaming), None


def _table(tables: TableFiles, streaming: bool, skip_damaged: bool) -> Callable[[], Any]:
    source, kind = tables.source, tables.kind

    def load() -> Any:
        # The library knows a file by its path and the time of modification alone.
        name = hashlib.sha256(repr(stamped(tables.files)).encode()).hexdigest()[:16]
        data_files = {"train": tables.files}
        return _loaded(source, kind, name=name, data_files=data_files, split="train", streaming=streaming)

    def load_intact() -> Any:
        try:
            return load()
        except DataError:
            # Damaged inside, which only reading shows.
            rest = intact(source.label, kind, tables.files, skip=skip_damaged, whole=True)
            if rest == tables.files:
                check_alike(source.label, kind, rest)
                raise
            tables.files = rest
            return load()

    return load_intact


def _hub(source: DataSource, streaming: bool) -> _Opened:
    if source.validation is not None:
        raise DataError(
            f"data source {source.label!r}: validation holds rows out of local files, and {source.path!r} is none; "
            "name a split of the Hub dataset, or part of one (split: train[:98%])"
        )
    if source.path in packaged_modules._PACKAGED_DATASETS_MODULES:
        raise DataError(
            f"data source {source.label!r}: {source.path!r} is a loader of datasets and not a data set, and would read "
            f"whatever lies in {os.getcwd()}; let path name files, or a Hub dataset with its owner"
        )
    read_cache_if_unreachable()
    place = {"name": source.subset, "split": source.split, "revision": source.revision}
    return "table", lambda: _loaded(source, source.path, **place, streaming=streaming), None


def _loaded(source: DataSource, *args: Any, **kwargs: Any) -> Any:
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as problem:
        raise _unreadable(source, problem) from problem


def _generated(source: DataSource, layout: Layout, files: list[Stamped], streaming: bool) -> Any:
    generate = read_lines if layout == "lines" else read_documents
    features = datasets.Features({"place": datasets.Value("string"), "text": datasets.Value("large_string")})
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    try:
        if next(generate(files), None) is None:
            raise _empty(source)
        return kind.from_generator(generate, features=features, gen_kwargs={"files": files})
    except Exception as problem:
        raise _unreadable(source, problem) from problem


def _empty(source: DataSource) -> DataError:
    return DataError(f"data source {source.label!r} is empty: {source.path} has no rows")


def _unreadable(source: DataSource, problem: BaseException) -> DataError:
    """The library's failure with its root cause, and what to do about it."""
    if isinstance(problem, DataError):
        return problem
    if (fault := cache_fault(problem, (str(datasets.config.HF_DATASETS_CACHE),))) is not None:
        return DataError(f"data source {source.label!r}: {fault}")
    cause = problem
    while cause.__cause__ is not None and not isinstance(cause, DataError):
        cause = cause.__cause__
    if isinstance(cause, MemoryError):
        return out_of_memory(source.label, cause)
    # In one line, which the library's messages are not.
    said = " ".join(str(cause).split())
    reason = said if isinstance(cause, DataError) else f"{type(cause).__name__}: {said}"
    if _is_on_disk(source):
        return DataError(f"data source {source.label!r} cannot be read: {reason}")
    return DataError(
        f"data source {source.label!r}: {source.path!r} is not a local file or folder, and as a Hub dataset (subset "
        f"{source.subset}, split {source.split}) it cannot be opened: {reason}. Check the id, subset and split; log in "
        "with `hf auth login` if it is gated; without a network, download it where there is one and let path name "
        "its files"
    )


def _first_row(
    source: DataSource, rows: datasets.Dataset | datasets.IterableDataset, layout: Layout
) -> Mapping[str, Any]:
    """The first row that can be read."""
    problem = ""
    for raw in islice(rows_of(source, rows), ROWS_TRIED):
        try:
            return fields_of(raw, layout)
        except MalformedRow as malformed:
            problem = problem or f": {raw['place']}: {malformed}"
    if problem:
        raise DataError(f"data source {source.label!r} holds no row that can be read{problem}")
    raise _empty(source)
