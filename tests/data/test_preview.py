"""A run's log shows how each source is read, and what is learned of its first document."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from sparsetrain.cli import app


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
def test_the_form_the_columns_and_the_first_document_are_shown(streaming, write_jsonl, stream, tokenizer):
    rows = [{"id": i, "prompt": "6 x 7?", "completion": f"4{i}\x1b", "topic": "sums"} for i in range(3)]
    source = {"path": write_jsonl(rows), "streaming": streaming, "separator": "\n", "name": "mine", "shuffle": False}
    rows = stream(source, length=33)
    state = rows.state_dict()
    documents = [rf"6 x 7?\n«4{i}\x1b<eos>»" for i in range(3)]
    assert rows.preview(tokenizer) == [
        "data: mine: prompt + completion from 'prompt', 'completion', joined with '\\n', not read: 'id', 'topic'",
        rf"data: mine: first document, learned in «»: {documents[0]}",
        f"data: first row: 33 tokens, 3 documents, 12 learned: {''.join(documents)}",
        f"data: {'32 rows' if streaming else '1 row'} of 33 tokens packed together: 100.0% full",
    ]
    assert "\n" in rows.first_text(tokenizer)
    assert rows.state_dict() == state
    assert next(rows).origin == [f"mine:{i}" for i in range(3)]


def test_long_stretches_are_shortened_and_synthetic_tasks_named(write_jsonl, stream, tokenizer):
    long = {"path": write_jsonl([{"prompt": "q" * 500, "completion": "a" * 500}]), "name": "long"}
    lines = stream(long, {"synthetic": "passkey"}, length=1200).preview(tokenizer)
    assert lines[1].endswith(f"{'q' * 30} ... {'q' * 30}«{'a' * 30} ... {'a' * 29}<eos>»")
    assert lines[2] == "data: passkey: the synthetic task passkey"
    assert "«" in lines[3]


CHATS = [
    {"messages": [{"role": r, "content": c * n} for r, c in (("user", "q"), ("assistant", "a"))]} for n in (5, 9, 70)
]
SAID = "<|im_start|>user\nqqqqq<|im_end|>\n<|im_start|>assistant\n«aaaaa<|im_end|>\n»"


@pytest.fixture
def previewed(tmp_path, monkeypatch, byte_tokenizer):
    """What `data preview` says of rows, as its exit code and its text."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"]).save_pretrained("tokenizer")

    def said(rows, *overrides):
        if isinstance(rows, list):
            lines = (row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
            Path("rows.jsonl").write_text("".join(lines))
        Path("mine.yaml").write_text(
            "base: quickstart\nmodel: {tokenizer: tokenizer, chat_template: chatml}\nsequence: {length: 128}\n"
            "eval: {tasks: []}\ndata: {sources: [{path: rows.jsonl}]}\n"
        )
        result = CliRunner().invoke(app, ["data", "preview", "mine.yaml", *overrides])
        return result.exit_code, result.output + str(result.exception or "")

    return said


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
def test_the_command_shows_forms_lengths_rows_and_what_is_learned(streaming, previewed):
    code, said = previewed(CHATS, f"data.sources.0.streaming={str(streaming).lower()}", "--rows", "9")
    assert code == 0, said
    assert "rows.jsonl: chat from 'messages'" in said
    assert "  3 rows, 3 documents, 231 tokens, 90 learned (39.0%)" in said
    assert "up to  64 tokens 1 ####" in said
    assert "longer than sequence.length=128: 1 document, split over several rows" in said
    assert ("an epoch is 2 rows of 128 tokens: 231 tokens, 90.2% full" in said) != streaming
    assert ("has no end, the first 1,0" in said) == streaming
    again = re.search(r"rows.jsonl: 3 documents, read (\d+) times for these rows: a stream begins again", said)
    assert bool(again) == streaming
    if again:  # its 3 documents fill about two rows of the first thousand
        assert 400 < int(again[1]) < 700
    assert SAID in said
    assert "-- document 1: rows.jsonl:" in said


def test_the_command_says_which_rows_are_left_out_and_why(previewed):
    bad = [{"messages": [{"role": "sage", "content": "a"}]}, {"messages": []}, "no json\n"]
    silent = {"messages": [{**turn, "train": False} for turn in CHATS[0]["messages"]]}
    code, said = previewed([*CHATS, *bad, *bad[:1], silent])
    assert code != 0
    assert re.search("cannot be read: 2 rows, such as .*rows.jsonl:4: turn 1 has the unknown role 'sage'", said)
    assert "rows.jsonl:5: 'messages' is empty" in said
    assert "left out: 1 row, empty or with nothing selected to learn" in said
    assert "a run stops at rows that cannot be read: 4 of rows.jsonl" in said
    code, said = previewed([*CHATS, *bad], "data.on_malformed=skip")
    assert code == 0, said


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
def test_rows_of_tables_have_their_file_in_a_preview(streaming, previewed, tmp_path):
    for name, texts in (("a", ["a" * 90, "b"]), ("b", ["c" * 200, None])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{name}.parquet")
    source = f"data.sources=[{{path: '*.parquet', shuffle: false, streaming: {str(streaming).lower()}}}]"
    code, said = previewed(None, source, "sequence.packing=false", "--rows", "4")
    assert code != 0
    assert "cannot be read: 1 row, such as b.parquet, row 1: 'text' is null" in said
    found = ["a.parquet, row 0, 91", "a.parquet, row 1, 2", "b.parquet, row 0, 128"]
    found.append("b.parquet, row 0, from token 128 on, 73")
    assert re.findall("-- document 1: (.*) tokens", said) == found
    if not streaming:
        held_out = source.replace("shuffle", "validation: 0.5, split: validation, shuffle")
        _, said = previewed(None, held_out, "sequence.packing=false", "--rows", "1", "data.on_malformed=skip")
        texts = {"a.parquet, row 0": "a" * 9, "a.parquet, row 1": "b", "b.parquet, row 0": "c" * 9}
        place, text = re.search(r"-- document 1: (.*), .* tokens\n«?(.{1,9})", said).groups()
        assert texts[place].startswith(text[:1])


def test_the_command_cuts_long_rows_and_names_the_shares_of_a_mixture(previewed):
    sources = "data.sources=[{path: rows.jsonl, weight: 3}, {path: rows.jsonl, name: again}]"
    code, said = previewed(CHATS, sources, "--rows", "1", "--tokens", "20", "data.long_documents=drop")
    assert code == 0, said
    assert "longer than sequence.length=128: 1 document, dropped" in said
    assert "75.0% of the draws" in said
    assert "tokens in the middle are not shown; --tokens 0 shows all" in said


def test_the_command_says_which_answer_of_a_pair_a_document_is_and_refuses_pairs_without_a_prompt(previewed):
    pairs = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in ("q?", "", " ")]
    pairs += [{"prompt": "q?", "chosen": "yes", "rejected": ""}, {"prompt": "q?", "chosen": "yes", "rejected": None}]
    code, said = previewed(pairs, "preference.loss=dpo", "data.long_documents=drop", "data.on_malformed=skip")
    assert code == 0, said
    assert "5 rows, 2 pairs, 20 tokens" in said
    for number in (1, 4):
        assert re.search(rf"-- document [13]: chosen of rows.jsonl:{number}, 6 tokens\nq\?«yes", said)
    assert re.search(r"-- document [24]: rejected of rows.jsonl:1, 5 tokens\nq\?«no", said)
    assert re.search(r"-- document [24]: rejected of rows.jsonl:4, 3 tokens\nq\?«<eos>", said)
    assert "2 rows, such as" in said
    assert "rows.jsonl:2: 'chosen' and 'rejected' do not begin with a prompt, and 'prompt' is empty" in said
    assert "rows.jsonl:5: 'rejected' is null, not a string" in said


def test_a_template_that_the_recipe_names_is_told_as_the_recipe_s(previewed):
    Path("mine.jinja").write_text("{% for m in messages %}")
    code, said = previewed(CHATS, "model.chat_template=mine.jinja")
    assert code != 0
    assert "cannot be compiled: line 1" in said
    assert "The template is what model.chat_template names" in said
