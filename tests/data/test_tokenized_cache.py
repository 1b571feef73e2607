"""What was tokenised is used again for the same rows, tokenizer and form, and for no others."""

from __future__ import annotations

import pytest

from sparsetrain.data import render
from sparsetrain.data.mapped import tokenized
from sparsetrain.data.sources import open_source
from sparsetrain.source_section import DataSource

ROWS = [{"text": f"row {i}", "other": f"another {i}"} for i in range(40)]


def _tokenized(source, tokenizer, num_workers):
    return tokenized(source, open_source(source, tokenizer, streaming=False), tokenizer, num_workers)


@pytest.fixture
def cache_file(write_jsonl):
    path = write_jsonl(ROWS)

    def build(tokenizer, *, num_workers=1, **source):
        files = _tokenized(DataSource(path=path, **source), tokenizer, num_workers).cache_files
        return [file["filename"] for file in files]

    return build


@pytest.fixture
def rendered(monkeypatch):
    """How many rows were really rendered."""
    count = []
    whole = render.render
    monkeypatch.setattr("sparsetrain.data.sources.render", lambda *args: count.append(1) or whole(*args))
    return count


def test_the_second_time_nothing_is_tokenised(cache_file, gpt2, rendered):
    first = cache_file(gpt2)
    assert len(rendered) == len(ROWS)
    assert cache_file(gpt2) == first
    assert len(rendered) == len(ROWS)


def test_calling_the_tokenizer_in_between_changes_nothing(cache_file, gpt2):
    first = cache_file(gpt2)
    gpt2(["a text to cut", "another"], truncation=True, max_length=2)
    assert cache_file(gpt2) == first


def test_another_tokenizer_never_finds_it(cache_file, gpt2, mistral, tokenizer, byte_tokenizer):
    tokenizers = [gpt2, mistral, tokenizer, byte_tokenizer(eos_token="<end>"), byte_tokenizer(bos_token="<s>")]
    extended = byte_tokenizer()
    extended.add_tokens(["row"])
    with_template = byte_tokenizer()
    with_template.chat_template = "{{ messages }}"
    caches = [tuple(cache_file(one)) for one in [*tokenizers, extended, with_template]]
    assert len(set(caches)) == len(caches)


def test_another_form_or_version_never_finds_it(cache_file, tokenizer, monkeypatch):
    plain = cache_file(tokenizer)
    assert cache_file(tokenizer, text_field="other") != plain
    monkeypatch.setattr("sparsetrain.data.mapped.RENDER_VERSION", 1_000)
    assert cache_file(tokenizer) != plain


def test_a_changed_file_is_read_again(write_jsonl, stream, tokenizer):
    for word in ("old", "new"):
        rows = stream({"path": write_jsonl([{"text": word}])})
        assert tokenizer.decode(next(rows).input_ids[:-1]) == word


def test_several_processes_give_the_same_rows(cache_file, write_jsonl, tokenizer, monkeypatch, tmp_path_factory):
    source = DataSource(path=write_jsonl(ROWS))
    alone = _tokenized(source, tokenizer, 1)[:]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("other"))
    assert _tokenized(source, tokenizer, 2)[:] == alone
