"""A run's log shows how each source is read, and what is learned of its first document."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
def test_the_form_the_columns_and_the_first_document_are_shown(streaming, write_jsonl, stream, tokenizer):
    rows = [{"id": i, "prompt": "6 x 7?", "completion": f"4{i}\x1b", "topic": "sums"} for i in range(3)]
    source = {"path": write_jsonl(rows), "streaming": streaming, "separator": "\n", "name": "mine", "shuffle": False}
    rows = stream(source)
    state = rows.state_dict()
    assert rows.preview(tokenizer) == [
        "data: mine: prompt + completion from 'prompt', 'completion', joined with '\\n', not read: 'id', 'topic'",
        r"data: mine: first document, learned in «»: 6 x 7?\n«40\x1b<eos>»",
    ]
    assert rows.state_dict() == state


def test_long_stretches_are_shortened_and_synthetic_tasks_named(write_jsonl, stream, tokenizer):
    long = {"path": write_jsonl([{"prompt": "q" * 500, "completion": "a" * 500}]), "name": "long"}
    lines = stream(long, {"synthetic": "passkey"}, length=1200).preview(tokenizer)
    assert lines[1].endswith(f"{'q' * 30} ... {'q' * 30}«{'a' * 30} ... {'a' * 29}<eos>»")
    assert lines[2] == "data: passkey: the synthetic task passkey"
    assert "«" in lines[3]
