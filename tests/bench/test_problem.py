from __future__ import annotations

import pytest
import torch

from sparsetrain.bench.contenders.tiles import tile_lists
from sparsetrain.bench.problem import PatternProblem, document_lengths, visible_pairs
from sparsetrain.patterns import PowerPattern


@pytest.mark.parametrize("total", [1, 63, 64, 100, 4096, 131072])
def test_documents_fill_the_length_and_none_is_too_short(total):
    lengths = document_lengths(total)
    assert sum(lengths) == total
    assert min(lengths) >= min(64, total)
    assert lengths == document_lengths(total)


def test_documents_are_about_as_long_as_asked_for():
    lengths = document_lengths(2**24)
    assert 3700 < sum(lengths) / len(lengths) < 4500


@pytest.mark.parametrize("length", [128, 1024, 5120, 8192])
def test_visible_pairs_count_tiles_and_half_of_the_diagonal_ones(length):
    pattern = PowerPattern()
    lists = tile_lists(pattern, length)
    tiles = int(lists.full_counts.sum()) + int(lists.partial_counts.sum()) / 2
    assert visible_pairs(pattern, length) == tiles * 128 * 128


def test_visible_pairs_are_nearly_the_pairs_of_the_mask():
    pattern = PowerPattern(block=16, window=2)
    exact = pattern.token_mask(300, 300).sum()
    assert visible_pairs(pattern, 300) == pytest.approx(exact, rel=0.02)


def test_flops_of_packed_documents_are_the_sum_over_them():
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": torch.device("cpu")}
    pattern = PowerPattern(block=16)
    packed = PatternProblem(600, documents=(500, 100), pattern=pattern, **shape)
    for sparse in (True, False):
        apart = [PatternProblem(length, pattern=pattern, **shape).flops(sparse) for length in (500, 100)]
        assert packed.flops(sparse) == sum(apart)
    assert packed.flops(sparse=False) == 4 * 8 * 4 * (500**2 + 100**2) / 2
    assert packed.cu_seqlens().tolist() == [0, 500, 600]
    assert packed.cu_seqlens().dtype == torch.int32
