"""Every kind of local source gives its documents; what cannot be opened says why."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest

from sparsetrain.errors import DataError

TEXTS = ["the first document", "the second, a little longer", "and a third one"]


def texts(rows, tokenizer, count):
    """The first ``count`` documents of a stream without packing."""
    return [tokenizer.decode(next(rows).input_ids[:-1]) for _ in range(count)]


def write(tmp_path, kind):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    match kind:
        case "jsonl":
            (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        case "jsonl with blank lines, CRLF and a BOM":
            lines = "\r\n\r\n".join(json.dumps({"text": text}) for text in TEXTS)
            (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        case "jsonl.gz":
            with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
        case "json array":
            (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=2))
        case "json lines":
            (tmp_path / "a.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        case "parquet":
            table.to_parquet(tmp_path / "a.parquet")
        case "arrow":
            table.save_to_disk(tmp_path)
            for file in tmp_path.glob("*.json"):
                file.unlink()
        case "txt":
            for name, text in zip("abc", TEXTS):
                (tmp_path / f"{name}.txt").write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
@pytest.mark.parametrize(
    "kind",
    [
        "jsonl",
        "jsonl with blank lines, CRLF and a BOM",
        "jsonl.gz",
        "json array",
        "json lines",
        "parquet",
        "arrow",
        "txt",
    ],
)
def test_every_format_gives_its_documents_in_order(kind, streaming, tmp_path, stream, tokenizer):
    rows = stream({"path": write(tmp_path, kind), "shuffle": False, "streaming": streaming}, packing=False)
    assert texts(rows, tokenizer, 6) == TEXTS * 2


def test_saved_datasets_are_read_by_their_arrow_files(tmp_path, stream, tokenizer):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    rows = stream({"path": str(tmp_path / "saved/*.arrow"), "shuffle": False}, packing=False)
    assert texts(rows, tokenizer, 3) == TEXTS


@pytest.mark.parametrize("path", ["{}/*.txt", "{}/**/*.txt", "{}/b.txt", "{}"])
def test_globs_folders_and_files_name_text_documents(path, tmp_path, stream, tokenizer):
    write(tmp_path, "txt")
    rows = stream({"path": path.format(tmp_path), "shuffle": False}, packing=False)
    assert texts(rows, tokenizer, 1) == [TEXTS[1] if path.endswith("b.txt") else TEXTS[0]]


def test_the_standard_library_is_split_by_whole_files(stream):
    train = stream({"path": "python-stdlib", "streaming": True, "shuffle": False})
    held_out = stream({"path": "python-stdlib", "split": "validation", "streaming": True, "shuffle": False})
    files = {row["place"] for row in train._sources[0]._opened.open()}
    held_out_files = {row["place"] for row in held_out._sources[0]._opened.open()}
    assert not files & held_out_files
    assert len(files) == pytest.approx(19 * len(held_out_files), abs=19)
    assert any(file.endswith("/argparse.py") for file in files | held_out_files)
    assert not any("/test/" in file or "site-packages" in file for file in files | held_out_files)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "missing/data.jsonl"}, r"'missing/data.jsonl': .* does not exist"),
        ({"path": "missing/*.parquet"}, r"no file matches missing/\*\.parquet"),
        ({"path": "python-stdlib", "split": "test"}, r"splits train and validation, not 'test'"),
        ({"path": "nobody/no-such-data"}, r"as a Hub dataset .* cannot be opened.*without a network"),
        ({"path": "{folder}/empty"}, r"holds no \.jsonl"),
        ({"path": "{folder}/empty.jsonl"}, r"is empty: .*empty\.jsonl has no rows"),
        ({"path": "{folder}/empty.jsonl", "streaming": True}, r"is empty: .*empty\.jsonl has no rows"),
        ({"path": "{folder}/blank.txt"}, r"is empty: none of its rows \(1\) gives"),
        ({"path": "{folder}/blank.txt", "streaming": True}, r"is empty: none of its rows \(1\) gives"),
        ({"path": "{folder}/latin1.txt"}, r"latin1\.txt is not UTF-8"),
        ({"path": "{folder}/latin1.txt", "streaming": True}, r"latin1\.txt is not UTF-8"),
        ({"path": "{folder}/broken.json"}, r"broken\.json:3 is not valid JSON"),
        (
            {"path": "{folder}/one.json"},
            r"one\.json is one JSON object, not rows; .*; its 'data' is a list: write that",
        ),
        ({"path": "{folder}/one.json", "streaming": True}, r"one\.json is one JSON object, not rows"),
        ({"path": "{folder}/broken.parquet"}, r"broken\.parquet|Parquet"),
        ({"path": "{folder}/picture.png"}, r"picture\.png is of an unknown kind"),
        ({"path": "{folder}/mixed"}, r"mixes kinds of files .*a\.jsonl.*b\.md"),
        ({"path": "{folder}/good.jsonl", "split": "validation"}, r"split belongs to Hub datasets"),
        ({"path": "{folder}/good.jsonl", "revision": "main"}, r"revision belongs to Hub datasets"),
    ],
)
def test_sources_that_cannot_be_opened_say_why(source, message, tmp_path, stream, write_jsonl):
    write_jsonl([{"text": "fine"}], "good.jsonl")
    write_jsonl([], "empty.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_jsonl([{"text": "fine"}], "mixed/a.jsonl")
    (tmp_path / "mixed/b.md").write_text("# fine")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.json").write_text('[{"text": "fine"},\n{"text": "fine"},\n{"text": }]')
    (tmp_path / "one.json").write_text('{\n"data": [\n{"text": "fine"}]\n}\n')
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(DataError, match=f"(?s){message}"):
        next(stream({**source, "path": source["path"].format(folder=tmp_path)}))


def test_a_missing_column_is_answered_with_the_nearest(stream, write_jsonl):
    path = write_jsonl([{"texts": "fine", "id": 1}])
    with pytest.raises(DataError, match=r"did you mean text_field: texts\?"):
        stream({"path": path})
    with pytest.raises(DataError, match=r"needs a column 'txt' \(did you mean 'texts'\?\); it has 'texts', 'id'"):
        stream({"path": path, "form": "text", "text_field": "txt"})
    with pytest.raises(DataError, match=r"fit no known form"):
        stream({"path": write_jsonl([{"front": "1+1", "back": "2"}], "cards.jsonl")})


@pytest.mark.parametrize("loader", ["json", "csv", "pandas", "text"])
def test_the_loaders_of_datasets_are_no_data_sets(loader, stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owl.json").write_text('{"text": "of nobody"}')
    for streaming in (False, True):
        with pytest.raises(DataError, match=f"'{loader}' is a loader of datasets and not a data set"):
            stream({"path": loader, "streaming": streaming})
