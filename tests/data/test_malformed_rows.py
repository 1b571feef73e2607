"""Rows that cannot be read are named and counted; the recipe says whether to stop."""

from __future__ import annotations

import itertools
import logging
import time

import datasets
import pytest
from tokenizers import Regex, decoders, pre_tokenizers

from sparsetrain.cli import main
from sparsetrain.data.files import parse_line
from sparsetrain.errors import DataError

BAD = [
    '{"text": "cut off',
    '["a", "list"]',
    '{"txt": "another column"}',
    '{"text": null}',
    '{"text": 5}',
    '{"text": "half of a pair: \\ud800"}',
    b'{"text": "caf\xe9 in latin-1"}',
]
REASONS = [
    "not valid JSON",
    "a JSON list, not an object",
    "it has no 'text', only 'txt'",
    "'text' is null, not a string",
    "'text' is of type int, not a string",
    "'text' is not valid Unicode: surrogates not allowed at character 16",
    "not UTF-8 text (byte 0xe9 at character 13); save the file as UTF-8",
]


@pytest.fixture
def path(tmp_path):
    """Good rows on odd lines, bad ones on even lines."""
    good = [f'{{"text": "row {i}"}}'.encode() for i in range(len(BAD))]
    lines = [line for i, bad in enumerate(BAD) for line in (good[i], bad if isinstance(bad, bytes) else bad.encode())]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    return str(tmp_path / "rows.jsonl")


def test_stop_names_the_file_and_line_of_the_first(path, stream):
    with pytest.raises(DataError, match=rf"7 of 14 rows cannot be read: {path}:2: {REASONS[0]}.*:4: .*:6: .*; \.\.\."):
        stream({"path": path})


def test_stop_names_the_line_when_a_stream_comes_to_it(path, stream):
    rows = stream({"path": path, "streaming": True})
    with pytest.raises(DataError, match=rf"{path}:2: not valid JSON.*on_malformed=skip"):
        next(rows)


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
def test_skip_counts_them_and_trains_on_the_others(path, streaming, stream, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "sparsetrain"):
        rows = stream(
            {"path": path, "shuffle": False, "streaming": streaming, "name": "mine"}, on_malformed="skip", packing=False
        )
        read = [tokenizer.decode(next(rows).input_ids[:-1]) for _ in BAD]
    assert read == [f"row {i}" for i in range(len(BAD))]
    assert rows.malformed == {"mine": len(BAD)}
    for line, reason in zip((2, 4, 6), REASONS):
        assert f"{path}:{line}: {reason}" in caplog.text


def test_each_reason_is_told(path, stream):
    rows = stream({"path": path}, on_malformed="skip")
    errors = [error for error in rows._sources[0]._rows["error"] if error]
    assert [reason in error for reason, error in zip(REASONS, errors)] == [True] * len(BAD)


def test_rows_of_a_table_are_named_by_number(tmp_path, stream):
    datasets.Dataset.from_dict({"text": ["fine", None, "fine"]}).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"/a\.parquet, row 1: 'text' is null"):
            next(stream({"path": str(tmp_path / "a.parquet"), "streaming": streaming, "shuffle": False}))


def test_a_source_without_one_good_row_is_refused(write_jsonl, stream):
    path = write_jsonl(["{", "["])
    with pytest.raises(DataError, match=r"holds no row that can be read.*data\.jsonl:1"):
        stream({"path": path}, on_malformed="skip")


def test_empty_texts_are_left_out_and_are_no_mistake(write_jsonl, stream, tokenizer):
    rows = stream({"path": write_jsonl([{"text": text} for text in ("a word", "", "  \n")])})
    assert [tokenizer.decode(next(rows).input_ids[:-1]) for _ in range(2)] == ["a word"] * 2
    assert rows.malformed == {rows._sources[0].label: 0}


def test_a_tokenizer_that_fails_on_a_text_makes_its_row_malformed(write_jsonl, byte_tokenizer, stream, capfd):
    hopeless = byte_tokenizer()
    # Tries ever more ways to match, until the Rust library gives up by a panic.
    hopeless.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    path = write_jsonl([{"text": "fine"}, {"text": "a" * 40 + "x"}])
    with pytest.raises(DataError, match=r"data.jsonl:2: the tokenizer fails on its text: .*retry-limit"):
        stream({"path": path}, tokenizer=hopeless)


def test_a_tokenizer_that_fails_on_its_own_tokens_is_one_message(write_jsonl, byte_tokenizer, tmp_path, capfd):
    hopeless = byte_tokenizer()
    hopeless.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex("(a+)+b"), "")]
    )
    hopeless.save_pretrained(tmp_path / "tokenizer")
    data = [f"data.sources=[{{path: {write_jsonl([{'text': 'a' * 40 + 'x'}])}}}]"]
    assert main(["recipe", "validate", "quickstart", f"model.tokenizer={tmp_path / 'tokenizer'}", *data]) == 2
    said = capfd.readouterr().err
    assert "error: tokenizers or safetensors failed on the content of a file: Onig" in said
    assert "Traceback" not in said


def test_a_short_streaming_source_gives_its_first_row_at_once(tmp_path, stream):
    (tmp_path / "one.txt").write_text("0")
    begun = time.process_time()
    assert len(next(stream({"path": str(tmp_path / "one.txt"), "streaming": True})).input_ids) == 64
    assert time.process_time() - begun < 6


def test_a_key_that_is_there_twice_is_no_valid_row():
    for line in ('{"text": "a", "text": "b"}', '{"text": "a", "more": [{"b": 1, "b": 2}]}'):
        with pytest.raises(ValueError, match=r"the key '(text|b)' appears twice"):
            parse_line(line)


def test_a_row_that_would_have_another_form_is_named(write_jsonl, stream):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"text": "plain"}, {"text": "", "messages": turns}]
    source = {"path": write_jsonl(rows), "shuffle": False}
    with pytest.raises(
        DataError, match=r"jsonl:2: it has 'messages', which the first row lacks, .* read as text; set form"
    ):
        list(itertools.islice(stream(source), 4))
    read = stream({**source, "form": "text"})
    assert next(read) is not None
