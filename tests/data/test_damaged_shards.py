"""A file that is cut, garbled or gone is named with the row; ``data.on_malformed`` says whether to go on without it."""

from __future__ import annotations

import gzip
import json
import logging
from collections import deque
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.ipc import new_stream
from pyarrow.parquet import read_table, write_table

from sparsetrain.data.shards import check_alike, check_kinds, intact, with_rows
from sparsetrain.errors import DataError

ROWS = 600
TEXTS = [f"row {i} of a file that is long enough to be cut" for i in range(ROWS)]
TABLES = ["parquet", "arrow"]
MODES = pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])


@pytest.fixture
def files(tmp_path):
    """``files(kind)``: the same rows in ``a`` and ``b``, and the path of ``b``."""

    def write(kind):
        folder = tmp_path / "shards"
        folder.mkdir()
        table = datasets.Dataset.from_dict({"text": TEXTS})
        for name in "ab":
            file = folder / f"{name}.{kind}"
            if kind == "parquet":
                table.to_parquet(file, batch_size=100)
            elif kind == "arrow":
                with datasets.arrow_writer.ArrowWriter(path=str(file), writer_batch_size=100) as writer:
                    for text in TEXTS:
                        writer.write({"text": text})
                    writer.finalize()
            else:
                lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
                file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
        return folder, folder / f"b.{kind}"

    return write


def cut(file):
    """As after an interrupted copy."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def garble(file):
    """As after a fault of the disk: the length is right."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff\xfe" * 200
    file.write_bytes(content)


def read(stream, folder, streaming, policy="stop"):
    """Draw documents until both files have been gone through."""
    rows = stream({"path": str(folder), "shuffle": False, "streaming": streaming}, on_malformed=policy, packing=False)
    for _ in range(2 * ROWS + 1):
        next(rows)
    return rows


@MODES
@pytest.mark.parametrize("kind", TABLES)
def test_a_cut_table_is_found_before_it_is_read(kind, streaming, files, stream, caplog):
    folder, file = files(kind)
    cut(file)
    with pytest.raises(DataError, match=rf"1 of 2 files are damaged: {file}.*on_malformed=skip"):
        stream({"path": str(folder), "streaming": streaming})
    with caplog.at_level(logging.WARNING, "sparsetrain"):
        read(stream, folder, streaming, "skip")
    assert f"1 of 2 files are damaged: {file}" in caplog.text
    assert "(left out)" in caplog.text


@pytest.mark.parametrize(("kind", "opens"), [("parquet", "ParquetFile"), ("arrow", "memory_map")])
def test_the_footer_of_a_file_is_read_once_until_it_changes(kind, opens, files, monkeypatch):
    """Whether it is cut, how many rows it has, and of which kind its columns are, are questions of one look."""
    _, file = files(kind)
    module = pq if kind == "parquet" else pa
    seen, open_it = [], getattr(module, opens)
    monkeypatch.setattr(module, opens, lambda path, *given, **more: seen.append(path) or open_it(path, *given, **more))
    named = [str(file)]
    assert intact("text", kind, named, skip=False, whole=False) == with_rows("text", kind, named) == named
    check_kinds("text", kind, [*named, *named], ())
    check_alike("text", kind, [*named, *named])
    assert seen == named
    cut(file)
    with pytest.raises(DataError, match=rf"1 of 1 files are damaged: {file}{', row 300' * (kind == 'arrow')}: "):
        intact("text", kind, named, skip=False, whole=False)


@MODES
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_is_damaged_inside_is_named_with_the_row(kind, streaming, files, stream):
    folder, file = files(kind)
    garble(file)
    with pytest.raises(DataError, match=rf"1 of 2 files are damaged: {file}(, row \d+)?: "):
        read(stream, folder, streaming)


@pytest.mark.parametrize("kind", TABLES)
def test_a_mapped_table_that_is_damaged_inside_is_left_out(kind, files, stream, tokenizer):
    folder, file = files(kind)
    garble(file)
    rows = read(stream, folder, False, "skip")
    assert rows._sources[0].size == ROWS


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_without_rows_is_left_out_and_one_with_other_columns_is_named(kind, files, stream):
    folder, file = files(kind)
    table = datasets.Dataset.from_file(str(folder / "a.arrow")).data.table if kind == "arrow" else read_table(file)
    for name, rows in (("0", table.slice(0, 0)), ("c", table.slice(0, 1).append_column("note", [["x"]]))):
        if kind == "parquet":
            write_table(rows, folder / f"{name}.parquet")
        else:
            with new_stream(str(folder / f"{name}.arrow"), rows.schema) as writer:
                writer.write_table(rows)
    for streaming in (False, True):
        with pytest.raises(DataError, match=rf"c.{kind} has the column 'note' as string, and .* not at all; write all"):
            read(stream, folder, streaming)
    (folder / f"c.{kind}").unlink()
    for streaming in (False, True):
        read(stream, folder, streaming)
    with pytest.raises(DataError, match=f"is empty: .*0.{kind} has no rows"):
        stream({"path": str(folder / f"0.{kind}")})


@MODES
def test_a_table_with_values_of_another_kind_is_named(tmp_path, stream, streaming):
    """The readers of datasets write them as texts. Nulls, and columns that are not read, may differ."""
    for name, value, number in (("0", "a", "x"), ("1", "b", 1), ("2", None, 1.5)):
        write_table(pa.table({"text": [value], "id": [number]}), tmp_path / f"{name}.parquet")
    read(stream, tmp_path, streaming, "skip")
    write_table(pa.table({"text": [7], "id": ["x"]}), tmp_path / "3.parquet")
    said = r"3.parquet has the column 'text' as int64, and .*0.parquet has it as string; write all"
    with pytest.raises(DataError, match=said):
        read(stream, tmp_path, streaming)


def test_a_table_with_values_of_another_kind_in_its_turns_is_named(tmp_path):
    files = [str(tmp_path / f"{name}.parquet") for name in "abc"]
    for file, content in zip(files, ("a", None, 7)):
        write_table(pa.table({"messages": [[{"role": "user", "content": content}]]}), file)
    check_kinds("chats", "parquet", files[:2], ())
    with pytest.raises(DataError, match=r"c.parquet has the column 'messages' as list<.*content: int64"):
        check_kinds("chats", "parquet", files, ())


@MODES
def test_a_cut_compressed_file_is_one_malformed_row_at_its_end(streaming, files, stream, caplog):
    folder, file = files("jsonl.gz")
    cut(file)
    with pytest.raises(DataError, match=rf"{file}:\d+: the file is damaged from here on: EOFError"):
        read(stream, folder, streaming)
    with caplog.at_level(logging.WARNING, "sparsetrain"):
        rows = read(stream, folder, streaming, "skip")
    assert f"{file}:" in caplog.text
    assert list(rows.malformed.values()) == [1]


@MODES
def test_a_file_cut_in_the_middle_of_a_line_is_named_with_the_line(streaming, files, stream):
    folder, file = files("jsonl")
    cut(file)
    lines = file.read_text().count("\n")
    with pytest.raises(DataError, match=rf"{file}:{lines + 1}: not valid JSON"):
        read(stream, folder, streaming)
    assert list(read(stream, folder, streaming, "skip").malformed.values()) == [1]


@MODES
def test_a_block_of_zeros_as_a_power_failure_leaves_it_is_one_malformed_row(streaming, files, stream):
    folder, file = files("jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3] = bytes(len(lines[3]) - 1) + b"\n"
    file.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=rf"{file}:4: not valid JSON: Expecting value at column 1"):
        read(stream, folder, streaming)
    assert list(read(stream, folder, streaming, "skip").malformed.values()) == [1]


@pytest.mark.parametrize("kind", [*TABLES, "jsonl"])
def test_a_file_that_disappears_stops_a_stream_whatever_the_policy(kind, files, stream):
    folder, file = files(kind)
    rows = stream(
        {"path": str(folder), "shuffle": False, "streaming": True}, on_malformed="skip", packing=False, length=64
    )
    next(rows)
    file.unlink()
    with pytest.raises(DataError, match=rf"cannot be read: FileNotFoundError: .*{file}"):
        deque(islice(rows, 2 * ROWS), maxlen=0)


def test_a_document_that_cannot_be_decompressed_is_malformed(tmp_path, stream, caplog):
    (tmp_path / "good.txt").write_text("a good document")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"words " * 4000)[:-20])
    with pytest.raises(DataError, match=r"torn\.txt\.gz: the file is damaged"):
        stream({"path": str(tmp_path)})
    rows = stream({"path": str(tmp_path)}, on_malformed="skip")
    assert list(rows.malformed.values()) == [1]
