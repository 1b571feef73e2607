"""Held-out text for perplexity: documents in order, each ended by EOS."""

from __future__ import annotations

import pytest

from sparsetrain.data import token_stream
from sparsetrain.errors import DataError
from sparsetrain.source_section import DataSource

TEXTS = ["first document", "", "second", "third, never needed"]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_joined_in_order(streaming, write_jsonl, tokenizer, mistral):
    source = DataSource(path=write_jsonl([{"text": text} for text in TEXTS]), streaming=streaming)
    stream = token_stream(source, tokenizer, 20)
    assert stream.tolist() == [*tokenizer("first document")["input_ids"], 256, *tokenizer("secon")["input_ids"]]
    assert mistral.decode(token_stream(source, mistral, 5)) == "first document</s> second</s>"


def test_the_standard_library_can_be_held_out(tokenizer):
    source = DataSource(path="python-stdlib", split="validation")
    stream = token_stream(source, tokenizer, 10_000)
    assert len(stream) == 10_000
    assert stream.dtype == "int64"


def test_sources_that_cannot_give_the_tokens_say_so(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "short"}, '{"text": 1}'])
    with pytest.raises(DataError, match=r"data\.jsonl:2: 'text' is of type int"):
        token_stream(DataSource(path=path), tokenizer, 100)
    assert len(token_stream(DataSource(path=path), tokenizer, 6)) == 6
    with pytest.raises(DataError, match=r"has only 6 tokens with this tokenizer, and 100 are asked for"):
        token_stream(DataSource(path=write_jsonl([{"text": "short"}])), tokenizer, 100)
    with pytest.raises(DataError, match="not on a synthetic task"):
        token_stream(DataSource(synthetic="passkey"), tokenizer, 100)
