"""Local sources: their files, the layout of their rows, and the first row, without importing ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from sparsetrain.data.files import DAMAGED, Kind, find_files, parse_line, read_documents, read_lines, stamped
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from sparsetrain.source_section import DataSource

Layout = Literal["lines", "documents", "table"]
"""The layout of a raw row: an unparsed line of JSON, a whole file, or the columns of a table."""

STDLIB = "python-stdlib"
ROWS_TRIED = 1000
"""Number of lines to search for the first that parses; its keys are the columns."""


def local_files(source: DataSource) -> tuple[Kind, list[str]]:
    """The kind of a source's files, and their paths.

    Raises:
        DataError: There are no files, several kinds or an unknown one, or the source has settings of a Hub dataset.
    """
    assert source.path is not None
    refuse_hub_settings(source)
    return find_files(source.label, source.path)


def refuse_hub_settings(source: DataSource) -> None:
    """Refuse settings that apply only to Hub datasets.

    Raises:
        DataError: There is such a setting; names it.
    """
    if source.path == STDLIB and source.validation is not None:
        raise DataError(
            f"data source {source.label!r}: {STDLIB} has a split validation of its own; leave out validation"
        )
    own_splits = source.path == STDLIB or source.validation is not None
    settings = ["subset", "revision"] if own_splits else ["subset", "revision", "split"]
    for name in settings:
        if getattr(source, name) != type(source).model_fields[name].default:
            raise DataError(
                f"data source {source.label!r}: {name} belongs to Hub datasets; {source.path} is local, so let path "
                f"name the files wanted{', or hold rows out by validation' if name == 'split' else ''}"
            )


def layout_of(kind: Kind) -> Layout:
    """The layout of rows in files of this kind."""
    if kind in ("parquet", "arrow"):
        return "table"
    return "lines" if kind == "lines" else "documents"


def fields_of(raw: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
    """The columns of a raw row.

    Raises:
        MalformedRow: It is not a JSON object, or marks an unreadable part of a file.
    """
    if layout == "table":
        return raw
    if layout == "documents":
        if raw["text"].startswith(DAMAGED):
            raise MalformedRow(raw["text"].removeprefix(DAMAGED))
        return {"text": raw["text"]}
    try:
        return parse_line(raw["text"])
    except ValueError as problem:
        raise MalformedRow(str(problem)) from problem


def readable_rows(source: DataSource, kind: Kind, files: list[str], *, skip: bool) -> Iterator[Mapping[str, Any]]:
    """The columns of the rows that can be read, in order.

    Args:
        skip: Skip unreadable files of a table; else refuse them.

    Raises:
        DataError: A file cannot be read.
    """
    layout = layout_of(kind)
    for raw in _table(source, kind, files, skip) if layout == "table" else _lines(kind, files):
        with suppress(MalformedRow):
            yield fields_of(raw["row"] if layout == "table" else raw, layout)


def first_row(source: DataSource, kind: Kind, files: list[str], *, remedy: str | None) -> tuple[str, Mapping[str, Any]]:
    """The place of the first readable row, and its columns.

    Args:
        remedy: What helps where a row cannot be read; None to skip unreadable rows and files.

    Raises:
        DataError: There is no such row.
    """
    layout, problem = layout_of(kind), ""
    rows = _table(source, kind, files, remedy is None) if layout == "table" else _lines(kind, files)
    for raw in islice(rows, ROWS_TRIED):
        place = raw["place"]
        try:
            return place, fields_of(raw["row"] if layout == "table" else raw, layout)
        except MalformedRow as malformed:
            if remedy is not None:
                raise DataError(f"data source {source.label!r}: {place}: {malformed}. {remedy}") from malformed
            problem = problem or f": {place}: {malformed}"
    if problem:
        raise DataError(f"data source {source.label!r} holds no row that can be read{problem}")
    raise DataError(f"data source {source.label!r} is empty: {source.path} has no rows")


def _lines(kind: Kind, files: list[str]) -> Iterator[dict[str, Any]]:
    return (read_lines if kind == "lines" else read_documents)(stamped(files))


def _table(source: DataSource, kind: Kind, files: list[str], skip: bool) -> Iterator[dict[str, Any]]:
    from sparsetrain.data.shards import intact, table_rows

    assert kind in ("parquet", "arrow")
    for file in intact(source.label, kind, files, skip=skip, whole=False):
        for number, row in enumerate(table_rows(kind, file)):
            yield {"place": f"{file}, row {number}", "row": row}
