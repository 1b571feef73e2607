"""The paper model of what ranks that share a sequence send one another."""

from __future__ import annotations

import pytest

from sparsetrain.bench.exchange import Shape, table
from sparsetrain.patterns import PowerPattern

SHAPE = Shape(heads=32, kv_heads=8, head_dim=128)
PATTERN = PowerPattern(block=256, window=5, sinks=1)
TOKEN = 2 * 8 * 128 * 2
"""Bytes of one token's keys and values."""


@pytest.mark.parametrize(("ranks", "chunks"), [(4, 2), (8, 3), (16, 4), (32, 5)])
def test_neighbours_send_a_logarithmic_number_of_chunks_and_the_sink(ranks, chunks):
    length = 131072
    received, _ = SHAPE.neighbours(length, ranks, 8, PATTERN)
    assert received == (chunks * length // ranks + 256) * TOKEN
    assert SHAPE.ring(length, ranks) == (ranks - 1) * length // ranks * TOKEN


def test_all_to_all_moves_what_is_not_at_home_already():
    # 16,384 tokens with 32 + 32 query and output heads and 8 + 8 key and value heads; an eighth stays.
    assert SHAPE.all_to_all(131072, 8, 8) == (16384 * 80 * 128 * 2 * 7 / 8, 0)
    # With 16 ranks every rank holds a copy of a key/value head, and half of all ranks are on the other node.
    assert SHAPE.all_to_all(131072, 16, 8) == (8192 * 96 * 128 * 2 * 15 / 16, 8192 * 96 * 128 * 2 / 2)
    assert SHAPE.all_to_all(131072, 64, 8) is None


def test_the_table_has_a_row_for_each_length_and_number_of_ranks():
    lines = table(SHAPE, [32768, 65536], [2, 64], 8, PATTERN).splitlines()
    assert lines[2] == "| 32,768 | 2 | 160 | 64 | 64 | 2.50 |"
    assert len(lines) == 6
    assert lines[3].split(" | ")[2] == "-"
