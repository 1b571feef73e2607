"""Documents of any length have the tokens of short ones, or are refused by size; what memory ran out for is named."""

from __future__ import annotations

import random
import re

import pytest

from sparsetrain.data import encoding, held_out_tokens
from sparsetrain.data.encoding import encode
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataMemoryError
from sparsetrain.source_section import DataSource
from sparsetrain.training.supervision.out_of_memory import is_out_of_memory

WORDS = ["字漢", " ", "\n\n", "  ", "word", "é😀", "\t", "x1", "</s>", "<s>", "...\n", ",  ", '"', "don't "]


@pytest.fixture
def _small_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 20_011)
    monkeypatch.setattr(encoding, "CONTEXT", 512)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("name", ["gpt2", "mistral", "tokenizer"])
@pytest.mark.parametrize("kind", ["book", "rough"])
def test_a_document_in_pieces_has_the_tokens_of_the_whole(name, kind, test_data, request):
    tokenizer = request.getfixturevalue(name)
    text = "".join(random.Random(0).choices(WORDS, k=40_000))
    if kind == "book":
        text = (test_data / "text/gutenberg/moby_dick_pg2701.txt").read_text(encoding="utf-8")[:150_000]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert encode(tokenizer, text) == whole


@pytest.mark.usefixtures("_small_pieces")
def test_what_cannot_be_cut_or_is_too_long_is_refused(tokenizer, write_jsonl, monkeypatch):
    assert len(encode(tokenizer, "a" * 4 * 20_011)) == 4 * 20_011
    with pytest.raises(MalformedRow, match="80,044 characters from character 0 on have no white space"):
        encode(tokenizer, "a" * 200_000)
    monkeypatch.setattr(encoding, "LONGEST", 100_000)
    source = DataSource(path=write_jsonl([{"text": "short"}, {"text": "a word " * 20_000}]))
    with pytest.raises(
        Exception, match=r"data\.jsonl:2: a document of 140,000 characters; cut it into ones of at most"
    ):
        held_out_tokens(source, tokenizer, 1000)


@pytest.mark.usefixtures("_small_pieces")
def test_a_document_that_takes_long_says_how_far_it_is(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "REPORT_EVERY", 0.0)
    with caplog.at_level("INFO"):
        encode(tokenizer, "a word " * 10_000)
    assert "tokenising a document of 70,000 characters: 0 % done" in caplog.text
    assert re.search("characters: [5-9]. % done", caplog.text)


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
def test_memory_that_runs_out_names_the_data_and_what_helps(streaming, stream, write_jsonl, monkeypatch):
    def fail(*_):
        raise MemoryError("malloc of size 8589934592 failed")

    monkeypatch.setattr("sparsetrain.data.sources.render", fail)
    source = {"path": write_jsonl([{"text": "words"}]), "streaming": streaming, "name": "mine"}
    with pytest.raises(
        DataMemoryError, match=r"'mine': memory ran out .*malloc of size.*num_workers.*streaming"
    ) as told:
        next(stream(source))
    assert told.value.exit_code == 3
    assert not is_out_of_memory(told.value)
    assert "lora" not in str(told.value)


def test_the_pieces_of_a_long_document_share_its_tokens(stream, write_jsonl):
    """A row is drawn from anywhere in a document; hundreds of copies of it would not fit into memory."""
    rows = stream({"path": write_jsonl([{"text": "a word " * 5000}])})
    pieces = [rows._sources[0].draw()[0] for _ in range(20)]
    assert len({piece.document.tokens.input_ids.__array_interface__["data"][0] for piece in pieces}) == 1
    assert all(piece.document.tokens.input_ids.dtype == "int32" for piece in pieces)
