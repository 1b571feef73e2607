"""Packing fills rows, never mixes documents, and loses no token."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
import torch

from sparsetrain.data import collate
from sparsetrain.data.packing import best_fit
from sparsetrain.errors import DataError

LENGTH = 64
EOS = 256


def letters(count, seed=0):
    """``count`` texts of 1 to 300 letters; with EOS, some just around whole rows."""
    rng = np.random.default_rng(seed)
    lengths = [62, 63, 64, 65, 126, 127, 128, 129, *rng.integers(1, 300, size=count - 8)]
    return ["".join(rng.choice(list("abcdefgh"), size=length)) for length in lengths]


@pytest.fixture
def corpus(write_jsonl, tokenizer):
    texts = letters(120)
    path = write_jsonl([{"text": text} for text in texts])
    return path, {i: [*tokenizer(text)["input_ids"], EOS] for i, text in enumerate(texts)}


def fragments(rows, count):
    """The document pieces of the next rows: (document, first token, tokens)."""
    found = []
    for row in (next(rows) for _ in range(count)):
        for name, tokens in zip(row.origin, np.split(row.input_ids, np.cumsum(row.lengths)[:-1]), strict=True):
            document, _, start = name.rpartition(":")[2].partition("@")
            found.append((int(document), int(start or 0), tokens.tolist()))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_split_gives_every_token_of_every_document_once_an_epoch(packing, corpus, stream):
    path, documents = corpus
    rows = stream({"path": path}, length=LENGTH, packing=packing)
    read = defaultdict(list)
    for document, start, tokens in fragments(rows, rows.rows_per_epoch()):
        assert 2 <= len(tokens) <= LENGTH
        assert documents[document][start : start + len(tokens)] == tokens
        read[document] += range(start, start + len(tokens))
    assert {document: sorted(places) for document, places in read.items()} == {
        document: list(range(len(tokens))) for document, tokens in documents.items()
    }


def test_a_document_that_fits_into_a_row_is_never_cut(corpus, stream):
    path, documents = corpus
    rows = stream({"path": path}, length=LENGTH)
    short = {document for document, tokens in documents.items() if len(tokens) <= LENGTH}
    whole = [
        document for document, _, tokens in fragments(rows, rows.rows_per_epoch()) if tokens == documents[document]
    ]
    assert sorted(whole) == sorted(short)


def test_truncate_keeps_the_beginning_and_drop_leaves_long_documents_out(corpus, stream, caplog):
    path, documents = corpus
    long = [document for document, tokens in documents.items() if len(tokens) > LENGTH]
    with caplog.at_level(logging.WARNING, "sparsetrain"):
        truncated = stream({"path": path}, length=LENGTH, long_documents="truncate")
        dropped = stream({"path": path}, length=LENGTH, long_documents="drop")
    read = {document: tokens for document, _, tokens in fragments(truncated, truncated.rows_per_epoch())}
    assert read == {document: tokens[:LENGTH] for document, tokens in documents.items()}
    read = {document: tokens for document, _, tokens in fragments(dropped, dropped.rows_per_epoch())}
    assert read == {document: tokens for document, tokens in documents.items() if document not in long}
    assert f"{len(long)} of 120 documents are longer than sequence.length=64 and are dropped" in caplog.text


def test_a_long_document_is_spread_over_the_epoch(write_jsonl, stream):
    book = {"text": "x" * (50 * LENGTH)}
    path = write_jsonl([book, *[{"text": "y" * (LENGTH - 1)}] * 150])
    rows = stream({"path": path}, length=LENGTH)
    names = [next(rows).origin[0] for _ in range(rows.rows_per_epoch())]
    places = [place for place, name in enumerate(names) if name.startswith(f"{path}:0")]
    assert len(places) == 51  # 50 rows and the end-of-text token
    first, last = places[len(places) // 4], places[-len(places) // 4]
    assert first < len(names) // 2 < last
    in_order = stream({"path": path, "shuffle": False}, length=LENGTH)
    assert [next(in_order).origin[0] for _ in range(3)] == [f"{path}:0", f"{path}:0@{LENGTH}", f"{path}:0@{2 * LENGTH}"]


def test_dropping_everything_is_an_error(write_jsonl, stream):
    with pytest.raises(
        DataError, match=r"data\.long_documents=drop leaves nothing of it.* longer than sequence\.length=64"
    ):
        next(stream({"path": write_jsonl([{"text": "x" * 100}])}, length=LENGTH, long_documents="drop"))


def test_truncation_leaves_out_a_prompt_that_lost_its_completion(write_jsonl, stream):
    path = write_jsonl([{"prompt": "p" * 100, "completion": "lost"}, {"prompt": "p", "completion": "kept"}])
    rows = stream({"path": path}, length=LENGTH, long_documents="truncate", packing=False)
    assert {next(rows).origin[0] for _ in range(4)} == {f"{path}:1"}


def test_split_leaves_out_pieces_without_a_target(write_jsonl, stream):
    path = write_jsonl([{"prompt": "p" * 150, "completion": "answer"}])
    rows = stream({"path": path}, length=LENGTH)
    row = next(rows)
    assert row.origin == [f"{path}:0@128"]
    assert rows.rows_per_epoch() == 1
    assert (row.labels != -100).sum() == len("answer") + 1


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streaming"])
def test_packed_rows_are_as_full_as_by_best_fit_over_all_data(streaming, write_jsonl, stream):
    """The lengths of GSM8K at 512 tokens, a fifth of it, in rows of as many: 98.3 % by best fit over all of it."""
    lengths = np.random.default_rng(0).gamma(5.0, 4.0, size=3000).astype(int) + 5
    path = write_jsonl([{"text": "x" * (length - 1)} for length in lengths])
    rows = stream({"path": path, "streaming": streaming}, length=LENGTH)
    # Of a stream, whole windows: it has no end at which the last rows are left less full.
    count = 2 * 256 if streaming else rows.rows_per_epoch()
    filled = sum(len(next(rows).input_ids) for _ in range(count)) / (count * LENGTH)
    best = sum(lengths) / (len(best_fit(lengths.tolist(), LENGTH)) * LENGTH)
    assert best > 0.97
    assert filled > best - 0.005


def test_best_fit_puts_the_longest_first_and_each_where_least_is_left():
    assert best_fit([3, 6, 4, 7, 10], 10) == [[0, 3], [1, 2], [4]]
    assert best_fit([5, 5, 5], 10) == [[0, 1], [2]]
    assert best_fit([], 10) == []


def test_without_packing_a_row_is_one_document(corpus, stream):
    path, _ = corpus
    rows = stream({"path": path}, length=LENGTH, packing=False)
    assert all(len(next(rows).lengths) == 1 for _ in range(rows.rows_per_epoch()))


def test_batches_keep_the_boundaries_of_every_document(corpus, stream):
    path, _ = corpus
    rows = stream({"path": path}, length=LENGTH)
    taken = [next(rows) for _ in range(40)]
    batch = collate(taken)
    lengths = [length for row in taken for length in row.lengths]
    assert len(lengths) > len(taken)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids.tolist() == [[place for length in lengths for place in range(length)]]
    assert batch.input_ids[0].tolist() == [token for row in taken for token in row.input_ids.tolist()]
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, sum(lengths))
    starts = batch.cu_seqlens[:-1].long()
    expected = batch.input_ids.clone()
    expected[0, starts] = -100
    assert torch.equal(batch.labels, expected)
    assert batch.num_target_tokens == (batch.labels[:, 1:] != -100).sum() == sum(lengths) - len(lengths)
    assert len(batch.origin) == len(lengths)


def test_sources_are_drawn_by_weight(write_jsonl, stream):
    paths = [write_jsonl([{"text": "some words"}] * 10, f"{name}.jsonl") for name in "abc"]
    sources = [{"path": path, "name": path[-7], "weight": weight} for path, weight in zip(paths, (1, 2, 5))]
    rows = stream(*sources, length=LENGTH)
    drawn = Counter(name[0] for _ in range(400) for name in next(rows).origin)
    total = sum(drawn.values())
    for name, weight in zip("abc", (1, 2, 5)):
        share = weight / 8
        assert drawn[name] == pytest.approx(share * total, abs=4 * (share * (1 - share) * total) ** 0.5)


def test_the_order_changes_with_the_epoch_and_the_seed_and_can_be_kept(corpus, stream):
    path, _ = corpus

    def first_epochs(**options):
        rows = stream({"path": path, "shuffle": options.pop("shuffle", True)}, packing=False, length=512, **options)
        names = [next(rows).origin[0] for _ in range(240)]
        return names[:120], names[120:]

    first, second = first_epochs()
    assert first != second
    assert sorted(first) == sorted(second)
    assert first_epochs()[0] == first
    assert first_epochs(seed=1)[0] != first
    assert first_epochs(shuffle=False) == ([f"{path}:{i}" for i in range(120)],) * 2


def test_epochs_are_counted_over_mapped_sources_alone(corpus, stream):
    path, _ = corpus
    retrieval = {"synthetic": "passkey", "digits": 2}
    mixed = stream({"path": path}, {**retrieval, "lengths": [600]}, length=700)
    taken = [name for _ in range(mixed.rows_per_epoch()) for name in next(mixed).origin]
    assert sorted(int(name[len(path) + 1 :]) for name in taken if name.startswith(path)) == list(range(120))
    for sources in ([{**retrieval, "lengths": [600]}], [{"path": path}, {"path": path, "streaming": True}]):
        with pytest.raises(DataError, match=r"set train\.steps or train\.tokens instead of train\.epochs"):
            stream(*sources, length=700).rows_per_epoch()


def test_weights_of_any_size_keep_their_ratio(write_jsonl, stream):
    path = write_jsonl([{"text": "some words"}] * 10)
    for scale in (1e308, 1.0, 1e-300):
        rows = stream(*({"path": path, "name": name, "weight": scale * part} for name, part in (("a", 1), ("b", 0.25))))
        assert rows._shares == [0.8, 1.0]


@pytest.mark.parametrize("weights", [(1e308, 1e-308), (1.0, 1e-12)])
def test_a_weight_beside_which_a_source_would_never_be_drawn_is_refused(weights, stream):
    with pytest.raises(ValueError, match=r"weight=1e-\d+ of b is .* of all weights, so .* never be drawn"):
        stream(*({"path": "x", "name": name, "weight": weight} for name, weight in zip("ab", weights)))


@pytest.mark.parametrize("beside", [[], [{"synthetic": "passkey"}]], ids=["alone", "in a mixture"])
def test_a_stream_of_prompts_longer_than_a_row_is_refused_early(beside, write_jsonl, stream):
    path = write_jsonl([{"prompt": "a long question " * 20, "completion": "yes"}] * 5)
    source = {"path": path, "streaming": True, "name": "mine"}
    rows = stream(source, *beside, long_documents="truncate", length=300)
    told = r"'mine': 200 documents in a row give nothing .*\(row 0, row 1, row 2, .*long_documents=split"
    with pytest.raises(DataError, match=told):
        list(islice(rows, 600))


@pytest.mark.parametrize("beside", [[], [{"synthetic": "passkey"}]], ids=["alone", "in a mixture"])
def test_prompts_longer_than_a_row_are_refused_with_the_settings_that_help(beside, write_jsonl, stream):
    path = write_jsonl([{"prompt": "a long question " * 20, "completion": "yes"}] * 5)
    told = r"'mine': all of its documents are longer .*raise sequence\.length, .*long_documents=split"
    with pytest.raises(DataError, match=told):
        stream({"path": path, "name": "mine"}, *beside, long_documents="truncate", length=300)
