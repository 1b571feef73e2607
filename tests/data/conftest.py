"""Tokenizers and small files for the data tests. Nothing here reaches for a network."""

from __future__ import annotations

import copy
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsetrain.data import build_rows
from sparsetrain.data.forms import resolve_form
from sparsetrain.data.render import render
from sparsetrain.recipe.schema import DataSection, DataSource, SequenceSection


def _byte_tokenizer(**special):
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<eos>", **special})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Every test tokenises for itself."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Makes tokenizers of one token a byte: 256 of them, then the special ones."""
    return _byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer):
    return byte_tokenizer()


@pytest.fixture(scope="session")
def rendered(tokenizer):
    """``rendered(row, template, **source)``: the text of a row, and that of each span that carries loss."""

    def of(row, template, **source):
        with_template = copy.copy(tokenizer)
        with_template.chat_template = template
        form = resolve_form(DataSource(path="x.jsonl", **source), list(row), with_template)
        input_ids, targets = render(row, form, with_template)
        return with_template.decode(input_ids), [with_template.decode(input_ids[a:b]) for a, b in targets]

    return of


@pytest.fixture(scope="session")
def gpt2(test_data):
    return AutoTokenizer.from_pretrained(test_data / "tokenizers/gpt2")


@pytest.fixture(scope="session")
def mistral(test_data):
    """Puts BOS before every text, and has a chat template that marks the assistant's words."""
    return AutoTokenizer.from_pretrained(test_data / "tokenizers/mistral-v3-32k")


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def stream(tokenizer):
    """Builds a stream of rows from sources given as mappings."""

    def build(*sources, length=64, packing=True, seed=0, tokenizer=tokenizer, **data):
        section = DataSection(sources=list(sources), **data)
        return build_rows(section, SequenceSection(length=length, packing=packing), tokenizer, seed)

    return build
