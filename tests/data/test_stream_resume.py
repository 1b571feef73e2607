"""A stream goes on exactly where its state says, wherever that is."""

from __future__ import annotations

import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsetrain.data import stream as stream_module
from sparsetrain.errors import DataError

LENGTH = 64


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    """So that several windows fit into a quick test; each resume packs one again."""
    monkeypatch.setattr(stream_module, "MOST_ROWS", stream_module.WINDOW_ROWS)


@pytest.fixture
def mixtures(tmp_path, write_jsonl):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), size=size)) for size in rng.integers(1, 400, size=50)]
    jsonl = [write_jsonl([{"text": text} for text in texts[i::2]], f"{i}.jsonl") for i in range(2)]
    table = datasets.Dataset.from_dict({"text": texts})
    table.to_parquet(tmp_path / "a.parquet", batch_size=7)
    bad = write_jsonl([{"text": text} if i % 5 else "{" for i, text in enumerate(texts)], "bad.jsonl")
    mapped, streaming = {"path": jsonl[0]}, {"path": str(tmp_path / "[01].jsonl"), "streaming": True}
    parquet = {"path": str(tmp_path / "a.parquet"), "streaming": True}
    synthetic = {"synthetic": "multikey", "keys": 1, "digits": 1, "lengths": [450, 500]}
    return {
        "mapped": ([mapped], LENGTH),
        "mapped without packing": ([mapped], LENGTH),
        "streaming lines": ([streaming], LENGTH),
        "streaming lines in order": ([{**streaming, "shuffle": False}], LENGTH),
        "streaming parquet": ([parquet], LENGTH),
        "streaming with malformed rows": ([{"path": bad, "streaming": True}], LENGTH),
        "synthetic": ([synthetic], 512),
        "mixture": ([mapped, {**streaming, "weight": 2}, synthetic, parquet], 512),
    }


KINDS = [
    "mapped", "mapped without packing", "streaming lines", "streaming lines in order", "streaming parquet",
    "streaming with malformed rows", "synthetic", "mixture",
]  # fmt: skip


def content(row):
    return row.origin, row.lengths, row.input_ids.tolist(), row.labels.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_before_any_row_gives_the_rows_that_would_have_come(kind, mixtures, stream):
    sources, length = mixtures[kind]

    def build():
        return stream(*sources, length=length, packing="without" not in kind, on_malformed="skip")

    rows, states, expected = build(), [], []
    for _ in range(250):  # more than two passes over 25 or 50 documents of 4 rows
        states.append(json.dumps(rows.state_dict()))
        expected.append(content(next(rows)))
    again = build()
    for start in [*range(0, 240, 7), 31, 32, 33, 1, 0]:
        again.load_state_dict(json.loads(states[start]))
        assert json.dumps(again.state_dict()) == states[start]
        for row in expected[start : start + 10]:
            assert content(next(again)) == row


@pytest.mark.parametrize("kind", ["mapped", "mixture"])
def test_a_resumed_stream_goes_on_for_epochs(kind, mixtures, stream):
    sources, length = mixtures[kind]
    rows, again = stream(*sources, length=length), stream(*sources, length=length)
    for _ in range(45):
        rows.skip()
    again.load_state_dict(json.loads(json.dumps(rows.state_dict())))
    assert [content(next(rows)) for _ in range(400)] == [content(next(again)) for _ in range(400)]


def test_states_fall_into_the_middle_of_documents(mixtures, stream):
    sources, length = mixtures["mapped"]
    rows = stream(*sources, length=length)
    before = {name.partition("@")[0] for _ in range(20) for name in next(rows).origin}
    after = {name.partition("@")[0] for _ in range(20) for name in next(rows).origin}
    assert before & after


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_a_row_is_passing_over_it(kind, mixtures, stream):
    sources, length = mixtures[kind]
    rows, skipping = (stream(*sources, length=length, on_malformed="skip") for _ in range(2))
    for _ in range(60):
        next(rows)
        skipping.skip()
    assert content(next(skipping)) == content(next(rows))


def test_counting_an_epoch_leaves_the_stream_where_it_is(mixtures, stream):
    sources, length = mixtures["mapped"]
    rows, counted = stream(*sources, length=length), stream(*sources, length=length)
    for _ in range(20):
        rows.skip()
        counted.skip()
    assert counted.rows_per_epoch() == counted.rows_per_epoch()
    assert content(next(counted)) == content(next(rows))


def test_the_state_of_mapped_sources_is_a_few_integers(mixtures, stream):
    sources, length = mixtures["mapped"]
    rows = stream(*sources, length=length)
    for _ in range(100):
        next(rows)
    assert len(json.dumps(rows.state_dict())) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 32}, r"sequence\.length 64, and the recipe now gives 32"),
        ({"seed": 1}, r"train\.seed 0, and the recipe now gives 1"),
        ({"packing": False}, r"sequence\.packing True"),
        ({"long_documents": "drop"}, r"data\.long_documents split"),
    ],
)
def test_a_state_of_another_recipe_is_refused(change, message, mixtures, stream):
    sources, length = mixtures["mapped"]
    state = stream(*sources, length=length).state_dict()
    with pytest.raises(DataError, match=message):
        stream(*sources, **{"length": length, **change}).load_state_dict(state)


def test_a_state_of_a_version_that_packed_otherwise_says_how_to_go_on(mixtures, stream):
    sources, length = mixtures["mapped"]
    state = stream(*sources, length=length).state_dict()
    del state["mixture"]["rows packed together"]
    with pytest.raises(DataError, match=r"of another version of sparsetrain.*model\.path=RUN/final"):
        stream(*sources, length=length).load_state_dict(state)


def _same_from_outside(path, kind, words):
    """Write a file whose size and time of modification do not show what is in it."""
    if kind == "parquet":
        pq.write_table(pa.table({"text": words}), path)
    else:
        path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_that_changed_are_read_anew_and_a_state_of_the_old_ones_is_refused(kind, streaming, stream, tmp_path):
    path = tmp_path / f"data.{kind}"
    source = {"path": str(path), "streaming": streaming, "shuffle": False}
    _same_from_outside(path, kind, ["aaaa", "bbbb", "cccc"])
    rows = stream(source, length=5)
    next(rows)
    state = rows.state_dict()
    _same_from_outside(path, kind, ["aaaa", "bbbb", "zzzz"])
    changed = stream(source, length=5)
    assert any(ord("z") - ord("!") in next(changed).input_ids for _ in range(3))
    with pytest.raises(DataError, match=rf"the rows of data source '.*data\.{kind}' differ from those that"):
        stream(source, length=5).load_state_dict(state)
    _same_from_outside(path, kind, ["aaaa", "bbbb", "cccc", "dddd"])
    with pytest.raises(DataError, match="differ from those that"):
        stream(source, length=5).load_state_dict(state)
    # The same rows elsewhere are the same data.
    moved = tmp_path / f"moved.{kind}"
    _same_from_outside(moved, kind, ["aaaa", "bbbb", "cccc"])
    resumed = stream({**source, "path": str(moved)}, length=5)
    resumed.load_state_dict(state)
    assert next(resumed).input_ids.tolist() == next(rows).input_ids.tolist()


def test_a_state_of_other_data_is_refused(mixtures, stream, write_jsonl):
    sources, length = mixtures["mapped"]
    state = stream(*sources, length=length).state_dict()
    fewer = {"path": write_jsonl([{"text": "words"}] * 3, "fewer.jsonl")}
    with pytest.raises(DataError, match=r"fewer.jsonl' differ.*pieces in each source \[82\], now \[3\]"):
        stream(fewer, length=length).load_state_dict(state)
