"""Find damaged table files, with row and reason, which the readers of ``datasets`` do not report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrain.data.files import Stamped, stamped
from sparsetrain.errors import DataError

logger = logging.getLogger(__name__)

NAMED_SHARDS = 3
"""Damaged files named in messages; the others are counted."""


@dataclass(frozen=True)
class Damage:
    """A file that cannot be read to its end."""

    file: str
    row: int
    """Rows before the damage that can be read; 0 where the file cannot be opened."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}" if self.row else f"{self.file}: {self.reason}"


def intact(label: str, kind: Literal["parquet", "arrow"], files: list[str], *, skip: bool, whole: bool) -> list[str]:
    """The files that can be read.

    Args:
        skip: leave damaged files out, naming them in the log; else refuse them.
        whole: read every row. Otherwise only what a cut file lacks is looked at (the footer of parquet, the lengths of
            the record batches of arrow), which takes milliseconds.

    Raises:
        DataError: files are damaged and are not to be left out, or none is intact.
    """
    damaged = [found for file in files if (found := damage(kind, file, whole=whole)) is not None]
    if not damaged:
        return files
    named = "; ".join(map(str, damaged[:NAMED_SHARDS])) + ("; ..." if len(damaged) > NAMED_SHARDS else "")
    message = f"data source {label!r}: {len(damaged)} of {len(files)} files are damaged: {named}"
    if not skip or len(damaged) == len(files):
        raise DataError(
            f"{message}. Fetch them again, or set data.on_malformed=skip, which leaves damaged files out (of a "
            "streaming source, only those that were cut)"
        )
    logger.warning("%s (left out)", message)
    broken = {each.file for each in damaged}
    return [file for file in files if file not in broken]


def with_rows(label: str, kind: Literal["parquet", "arrow"], files: list[str]) -> list[str]:
    """The files that have rows; the readers of ``datasets`` fail on others.

    Raises:
        DataError: none has.
    """
    found = [file for file in files if count_rows(kind, file)]
    if not found:
        of = files[0] if len(files) == 1 else f"none of its {len(files)} files"
        raise DataError(f"data source {label!r} is empty: {of} has {'no ' if len(files) == 1 else ''}rows")
    return found


def check_alike(label: str, kind: Literal["parquet", "arrow"], files: list[str]) -> None:
    """Refuse files with other columns than the first, which the readers of ``datasets`` do not name.

    Raises:
        DataError: there is such a file.
    """
    _compare_with_first(label, kind, files, lambda name, found, first: found != first)


def check_kinds(label: str, kind: Literal["parquet", "arrow"], files: list[str], unread: Collection[str]) -> None:
    """Refuse files that have values of another kind in a column than the first, such as numbers where it has texts: the
    readers of ``datasets`` write them as the first file's kind, in silence.

    Args:
        unread: columns whose values do not matter.

    Raises:
        DataError: there is such a file.
    """

    def unlike(name: str, found: pa.DataType | None, first: pa.DataType | None) -> bool:
        return found is not None and first is not None and name not in unread and _differ(found, first)

    _compare_with_first(label, kind, files, unlike)


def _compare_with_first(
    label: str,
    kind: Literal["parquet", "arrow"],
    files: list[str],
    unlike: Callable[[str, Any, Any], bool],
) -> None:
    """Refuse the first file with a column that is ``unlike`` that of the first file; it is given the column's name and
    both types, None where a file has no such column."""
    first = _look(kind, files[0]).columns
    for file in files[1:]:
        found = _look(kind, file).columns
        for name in sorted({*found, *first}):
            if unlike(name, found.get(name), first.get(name)):
                here, there = ("not at all" if of is None else f"as {of}" for of in (found.get(name), first.get(name)))
                raise DataError(
                    f"data source {label!r}: {file} has the column {name!r} {here}, and {files[0]} has it {there}; "
                    "write all with the same columns, or make each kind a source of its own"
                )


def _differ(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether values of two types are of different kinds; a shorter number, or a column of nulls, is none."""
    if pa.types.is_null(one) or pa.types.is_null(other):
        return False
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {each.name: each.type for each in other}
        return any(each.name in fields and _differ(each.type, fields[each.name]) for each in one)
    if (kind := _kind(one)) != _kind(other):
        return True
    return kind == "list" and _differ(one.value_type, other.value_type)


def _kind(of: pa.DataType) -> str:
    if pa.types.is_dictionary(of):
        return _kind(of.value_type)
    kinds = {"text": _is_text, "number": _is_number, "list": _is_list, "struct": pa.types.is_struct}
    return next((kind for kind, fits in kinds.items() if fits(of)), str(of))


def _is_number(of: pa.DataType) -> bool:
    return any(fits(of) for fits in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def _is_text(of: pa.DataType) -> bool:
    return pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_string_view(of)


def _is_list(of: pa.DataType) -> bool:
    return pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of)


class _Table(NamedTuple):
    """What a file says of itself, without its rows being read."""

    rows: int
    columns: dict[str, pa.DataType]
    """Types by name."""


def _look(kind: Literal["parquet", "arrow"], file: str) -> _Table:
    """The footer of parquet, or the schema and the lengths of the record batches of arrow. A file that has not changed
    is opened once, however many questions its footer answers.

    Raises:
        ArrowException, OSError, EOFError: the file is cut or cannot be read.
    """
    return _looked(kind, stamped([file])[0])


@lru_cache(maxsize=16384)
def _looked(kind: Literal["parquet", "arrow"], file: Stamped) -> _Table:
    if kind == "parquet":
        with pq.ParquetFile(file.path) as opened:
            rows, schema = opened.metadata.num_rows, opened.schema_arrow
    else:
        with pa.memory_map(file.path) as stream:
            reader = _arrow_reader(stream)
            rows, schema = sum(batch.num_rows for batch in _batches_of(reader)), reader.schema
    return _Table(rows, {each.name: each.type for each in schema})


def damage(kind: Literal["parquet", "arrow"], file: str, *, whole: bool) -> Damage | None:
    """The damage of a file, or None.

    Raises:
        OSError: the system cannot read it: it is gone, or not ours to read.
    """
    if not whole:
        with suppress(pa.ArrowException, OSError, EOFError):  # which the row of the damage is found by below
            _look(kind, file)
            return None
    row = 0
    try:
        for batch in _parquet_batches(file) if kind == "parquet" else _arrow_batches(file):
            batch.validate(full=True)
            row += batch.num_rows
    except (pa.ArrowException, OSError, EOFError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        return Damage(file, row, " ".join(str(problem).split()).rstrip("."))
    return None


def count_rows(kind: Literal["parquet", "arrow"], file: str) -> int:
    """The number of rows of an intact file, without reading them."""
    return _look(kind, file).rows


def table_rows(kind: Literal["parquet", "arrow"], file: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, read as they are asked for.

    Raises:
        DataError: they cannot be read.
    """
    try:
        for batch in _parquet_batches(file, rows=1) if kind == "parquet" else _arrow_batches(file):
            for number in range(batch.num_rows):
                yield batch.slice(number, 1).to_pylist()[0]
    except (pa.ArrowException, EOFError) as problem:
        raise DataError(f"{file} is damaged: {' '.join(str(problem).split())}") from problem


def _parquet_batches(file: str, rows: int = 256) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file) as opened:
        yield from opened.iter_batches(batch_size=rows)


def _arrow_batches(file: str) -> Iterator[pa.RecordBatch]:
    """Both forms of arrow files; mapped into memory, so that only what is looked at is read."""
    with pa.memory_map(file) as stream:
        yield from _batches_of(_arrow_reader(stream))


def _batches_of(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from reader


def _arrow_reader(stream: pa.NativeFile) -> Any:
    try:
        return pa.ipc.open_stream(stream)
    except pa.ArrowInvalid as problem:
        try:
            return pa.ipc.open_file(stream)
        except pa.ArrowInvalid:
            raise problem from None
