"""What ranks that share a sequence send one another: the paper model, and what is timed."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sparsetrain.bench import exchanging
from sparsetrain.cli import main
from sparsetrain.patterns import PowerPattern
from sparsetrain.world import World

PATTERN = PowerPattern(block=256, window=5, sinks=1)
TOKEN = 2 * 8 * 128 * 2
"""Bytes of one token's keys and values."""


@pytest.fixture(scope="module")
def paper():
    """The module that counts bytes for the docs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parents[2] / "docs/generate"))
        yield importlib.import_module("exchange")


@pytest.fixture(scope="module")
def shape(paper):
    """A layer of an 8B model."""
    return paper.Shape(heads=32, kv_heads=8, head_dim=128)


@pytest.mark.parametrize(("ranks", "chunks"), [(4, 2), (8, 3), (16, 4), (32, 5)])
def test_neighbours_send_a_logarithmic_number_of_chunks_and_the_sink(shape, ranks, chunks):
    length = 131072
    received, _ = shape.neighbours(length, ranks, 8, PATTERN)
    assert received == (chunks * length // ranks + 256) * TOKEN
    assert shape.ring(length, ranks) == (ranks - 1) * length // ranks * TOKEN


def test_all_to_all_moves_what_is_not_at_home_already(shape):
    # 16,384 tokens with 32 + 32 query and output heads and 8 + 8 key and value heads; an eighth stays.
    assert shape.all_to_all(131072, 8, 8) == (16384 * 80 * 128 * 2 * 7 / 8, 0)
    # With 16 ranks every rank holds a copy of a key/value head, and half of all ranks are on the other node.
    assert shape.all_to_all(131072, 16, 8) == (8192 * 96 * 128 * 2 * 15 / 16, 8192 * 96 * 128 * 2 / 2)
    assert shape.all_to_all(131072, 64, 8) is None


def test_the_table_has_a_row_for_each_length_and_number_of_ranks(paper, shape):
    lines = paper.table(shape, [32768, 65536], [2, 64], 8, PATTERN).splitlines()
    assert lines[2] == "| 32,768 | 2 | 160 | 64 | 64 | 2.50 |"
    assert len(lines) == 6
    assert lines[3].split(" | ")[2] == "-"


@pytest.fixture
def over_ranks(monkeypatch):
    """Runs a function of a rank on each of several threads, which exchange as ranks do."""

    def start(size, act):
        board, meet, local = {}, threading.Barrier(size), threading.local()

        def send(part, outgoing, incoming):
            board[local.rank] = outgoing
            meet.wait(10)
            for other, tensor in incoming.items():
                tensor.copy_(board[other][local.rank])
            meet.wait(10)

        def of_rank(rank):
            local.rank = rank
            return act(rank)

        monkeypatch.setattr(exchanging, "_send", send)
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(of_rank, range(size)))

    return start


def part_of(rank, size, tokens, query, key_value, pattern):
    mine = slice(rank * tokens, (rank + 1) * tokens)
    return exchanging.Part(query[:, mine], key_value[:, :, mine], World(rank, size, torch.device("cpu")), pattern)


def test_neighbours_send_the_chunks_of_the_pattern(over_ranks):
    size, tokens, pattern = 4, 8, PowerPattern(block=2, window=1, sinks=1)
    query, key_value = torch.zeros(8, size * tokens, 3), torch.randn(2, 4, size * tokens, 3)
    parts = [part_of(rank, size, tokens, query, key_value, pattern) for rank in range(size)]

    # Rank 3 reads of rank 0 no more than the sink, the others whole neighbours.
    needed = [{}, {0: 8}, {0: 8, 1: 8}, {0: 2, 1: 8, 2: 8}]
    for rank, chunks in enumerate(over_ranks(size, lambda rank: exchanging._neighbours(parts[rank]))):
        assert {other: found.shape[2] for other, found in chunks.items()} == needed[rank]
        for other, found in chunks.items():
            assert torch.equal(found, parts[other].key_value[:, :, : needed[rank][other]])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_what_is_timed_moves_the_bytes_of_the_model(shape, ranks):
    length = 8192 * ranks
    query, key_value = torch.empty(32, 8192, 128, device="meta"), torch.empty(2, 8, 8192, 128, device="meta")
    query, key_value = query.bfloat16(), key_value.bfloat16()
    parts = [exchanging.Part(query, key_value, World(rank, ranks, None), PATTERN) for rank in range(ranks)]
    assert exchanging.ALL_TO_ALL.received(parts[0]) == shape.all_to_all(length, ranks, 8)[0]
    received = max(exchanging.NEIGHBOURS.received(part) for part in parts)
    assert received == shape.neighbours(length, ranks, 8, PATTERN)[0]


def test_one_rank_has_nothing_to_exchange(capsys):
    assert main(["bench", "exchange"]) == 2
    assert "one rank sends nothing" in capsys.readouterr().err
