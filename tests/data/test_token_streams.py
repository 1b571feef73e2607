"""Held-out text for perplexity: documents in order, each ended by EOS."""

from __future__ import annotations

import pytest

from sparsetrain.data import held_out_tokens
from sparsetrain.errors import DataError
from sparsetrain.source_section import DataSource

TEXTS = ["first document", "", "second", "third, never needed"]


def scored(held_out, tokenizer):
    return tokenizer.decode(held_out.input_ids[held_out.targets])


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_joined_in_order(streaming, write_jsonl, tokenizer, mistral):
    source = DataSource(path=write_jsonl([{"text": text} for text in TEXTS]), streaming=streaming)
    stream = held_out_tokens(source, tokenizer, 20).input_ids
    assert stream.tolist() == [*tokenizer("first document")["input_ids"], 256, *tokenizer("secon")["input_ids"]]
    assert mistral.decode(held_out_tokens(source, mistral, 5).input_ids) == "first document</s> second</s>"


def test_the_standard_library_can_be_held_out(tokenizer):
    source = DataSource(path="python-stdlib", split="validation")
    stream = held_out_tokens(source, tokenizer, 10_000).input_ids
    assert len(stream) == 10_000
    assert stream.dtype == "int64"


def test_sources_that_cannot_give_the_tokens_say_so(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "short"}, '{"text": 1}'])
    with pytest.raises(DataError, match=r"data\.jsonl:2: 'text' is of type int"):
        held_out_tokens(DataSource(path=path), tokenizer, 100)
    assert len(held_out_tokens(DataSource(path=path), tokenizer, 6).input_ids) == 6
    with pytest.raises(DataError, match=r"has only 6 tokens with this tokenizer, and 100 are asked for"):
        held_out_tokens(DataSource(path=write_jsonl([{"text": "short"}])), tokenizer, 100)
    with pytest.raises(DataError, match="not on a synthetic task"):
        held_out_tokens(DataSource(synthetic="passkey"), tokenizer, 100)


def test_all_of_a_text_is_scored_and_where_documents_begin_is_known(write_jsonl, tokenizer):
    held_out = held_out_tokens(DataSource(path=write_jsonl([{"text": text} for text in TEXTS])), tokenizer, 24)
    assert held_out.targets.all()
    assert held_out.starts.tolist() == [0, 15, 22]


def test_of_rows_with_labels_only_these_are_scored(write_jsonl, tokenizer, mistral):
    rows = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "3 + 3 =", "completion": " six"}]
    held_out = held_out_tokens(DataSource(path=write_jsonl(rows)), tokenizer, 22)
    assert scored(held_out, tokenizer) == " 4<eos> six<eos>"
    chat = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
    source = DataSource(path=write_jsonl([{"messages": chat}] * 4, "chat.jsonl"))
    assert scored(held_out_tokens(source, mistral, 20), mistral).split("</s>")[0].strip() == "1"
    assert not held_out_tokens(source, mistral, 20).targets.all()
    labels = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, -100]}
    source = DataSource(path=write_jsonl([labels], "tokens.jsonl"))
    assert held_out_tokens(source, tokenizer, 5).targets.tolist() == [False, False, True, False, False]
    with pytest.raises(DataError, match="none of the first 2 tokens has a label"):
        held_out_tokens(source, tokenizer, 2)
