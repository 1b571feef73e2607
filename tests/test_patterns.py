"""The lists of every pattern against its definition written as a predicate, and the figures that follow from them."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from sparsetrain.methods.ruler import RulerPattern
from sparsetrain.patterns import (
    DilatedPattern,
    DistancePattern,
    FullPattern,
    HeadDistancePattern,
    LongNetPattern,
    Pattern,
    PowerPattern,
    SlidingPattern,
    StridePattern,
)

PATTERNS = [
    FullPattern(4),
    *(PowerPattern(4, window, sinks) for window in (1, 2, 3, 5, 8) for sinks in (0, 1, 3)),
    *(SlidingPattern(4, window, sinks) for window in (1, 4) for sinks in (0, 1, 3)),
    *(StridePattern(4, window, sinks, stride) for window, stride in ((1, 1), (2, 5), (6, 4)) for sinks in (0, 2)),
    DilatedPattern(4, 10, 2),
    DilatedPattern(4, 3, 5),
    LongNetPattern(4),
    LongNetPattern(4, ((4, 1), (8, 2), (32, 4)), head_shift=True, num_heads=5),
    DistancePattern(4, (0, 3, 7), 2),
    HeadDistancePattern(4, ((0, 1, 6), (0, 3, 7)), 2),
    PowerPattern(4, 1, 0, base=4),
    PowerPattern(4, 5, 1, base=3),
    PowerPattern(4, 2, 1, farthest=12),
    RulerPattern(4, 5, 1, keep=2, levels=9),
    RulerPattern(4, 1, 0, keep=3, levels=2),
    RulerPattern(4, 9, 3, keep=1, levels=0),
]
CASES = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)


def defined(pattern: Pattern, query: np.ndarray, key: np.ndarray, head: int) -> np.ndarray:
    """The published definition: whether block ``query`` reads block ``key``, for arrays of block numbers."""
    delta = query - key
    match pattern:
        case FullPattern():
            reads = delta >= 0
        case PowerPattern(window=window, sinks=sinks, base=base, farthest=farthest):
            far = [d * base**k for k in range(8) for d in range(1, base) if d * base**k <= (farthest or 2**20)]
            reads = (key < sinks) | (delta < window) | np.isin(delta, far)
        case RulerPattern(window=window, sinks=sinks, keep=keep, levels=levels):
            kept = keep * np.max([2**m * ((key + 1) % 2**m == 0) for m in range(levels + 1)], axis=0)
            reads = (key < sinks) | (delta < window) | (delta <= kept)
        case StridePattern(window=window, sinks=sinks, stride=stride):
            reads = (key < sinks) | (delta < window) | (delta % stride == 0)
        case SlidingPattern(window=window, sinks=sinks):
            reads = (key < sinks) | (delta < window)
        case DilatedPattern(window=window, dilation=dilation):
            reads = (delta % dilation == 0) & (delta < window * dilation)
        case LongNetPattern(segments=segments, head_shift=head_shift):
            reads = np.zeros(np.broadcast(query, key).shape, dtype=bool)
            for length, rate in segments:
                shift = head % rate if head_shift else 0
                same_segment = query // length == key // length
                reads |= same_segment & (query % rate == shift) & (key % rate == shift)
        case DistancePattern(distances=distances, sinks=sinks):
            reads = (key < sinks) | np.isin(delta, distances)
        case HeadDistancePattern(distances=distances, sinks=sinks):
            reads = (key < sinks) | np.isin(delta, distances[head])
        case _:
            raise AssertionError(pattern)
    return reads & (delta >= 0)


def grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n)[:, None], np.arange(n)[None, :]


@CASES
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 37, 64])
def test_lists_are_the_rows_and_columns_of_the_definition(pattern: Pattern, num_blocks: int) -> None:
    for head in pattern.heads:
        expected = defined(pattern, *grid(num_blocks), head)
        assert (pattern.mask(num_blocks, head) == expected).all()
        for t in range(num_blocks):
            assert list(pattern.key_blocks(t, head)) == np.flatnonzero(expected[t]).tolist()
            assert list(pattern.query_blocks(t, num_blocks, head)) == np.flatnonzero(expected[:, t]).tolist()
            assert pattern.key_blocks(t, head)[-1] == t
    assert pattern.max_key_blocks(num_blocks) == max(
        pattern.mask(num_blocks, head).sum(axis=1).max() for head in pattern.heads
    )


@pytest.mark.parametrize("window", range(1, 10))
@pytest.mark.parametrize("sinks", range(4))
def test_power_lists_have_the_length_of_the_formula(window: int, sinks: int) -> None:
    pattern = PowerPattern(1, window, sinks)
    for t in range(sinks, 300):
        far = t - sinks
        powers = max(0, far.bit_length() - 1 - (window - 1).bit_length() + 1) if far else 0
        assert len(pattern.key_blocks(t)) == sinks + min(window, far + 1) + powers


@CASES
def test_token_mask_is_the_definition_between_tokens(pattern: Pattern) -> None:
    for n_query, n_key, q_start in ((1, 1, None), (35, 35, None), (6, 41, None), (7, 41, 13)):
        query = np.arange(n_query)[:, None] + (n_key - n_query if q_start is None else q_start)
        key = np.arange(n_key)[None, :]
        for head in pattern.heads:
            expected = defined(pattern, query // pattern.block, key // pattern.block, head) & (key <= query)
            assert (pattern.token_mask(n_query, n_key, q_start, head) == expected).all()


@CASES
@pytest.mark.parametrize("length", [1, 4, 30, 97])
def test_density_counts_the_token_pairs_of_ragged_lengths(pattern: Pattern, length: int) -> None:
    for head in pattern.heads:
        pairs = int(pattern.token_mask(length, length, head=head).sum())
        assert pattern.density(length, head) == pairs / (length * (length + 1) / 2)


@CASES
@pytest.mark.parametrize("num_blocks", [1, 5, 33])
def test_reach_is_the_boolean_product_of_the_masks(pattern: Pattern, num_blocks: int) -> None:
    layer = np.any([pattern.mask(num_blocks, head) for head in pattern.heads], axis=0)
    product = np.eye(num_blocks, dtype=bool)
    reach = pattern.reach(num_blocks, 6)
    for k in range(6):
        product = layer @ product
        assert (reach[k] == product[-1]).all()
    assert (pattern.receptive_field(num_blocks, 6) == reach.mean(axis=1)).all()


def test_layers_to_cover_is_the_first_full_layer_or_none() -> None:
    for pattern, num_blocks in itertools.product(PATTERNS, (2, 9, 40)):
        shares = pattern.receptive_field(num_blocks, num_blocks).tolist()
        full = [layer for layer, share in enumerate(shares, 1) if share == 1]
        assert pattern.layers_to_cover(num_blocks) == (full[0] if full else None)


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_power_covers_everything_after_exactly_the_layers_of_the_formula(exponent: int) -> None:
    pattern = PowerPattern(1, window=2**exponent + 1, sinks=0)
    for num_blocks in range(2, 140):
        layers = next(n for n in range(1, 20) if 2**exponent * (2**n - 1) >= num_blocks - 1)
        assert pattern.layers_to_cover(num_blocks) == layers
    before = np.linalg.matrix_power(pattern.mask(num_blocks).astype(float), layers - 1) > 0
    after = pattern.mask(num_blocks) @ before
    assert (after == np.tri(num_blocks, dtype=bool)).all()
    assert (before != after).any()


def test_dense_layers_reach_everything_from_there_on() -> None:
    pattern = SlidingPattern(4, 2, 0)
    reach = pattern.reach(20, 5, dense_layers=[2])
    assert (reach[:2] == pattern.reach(20, 2)).all()
    assert not reach[1].all()
    assert reach[2:].all()


def test_published_figures_at_32k() -> None:
    """Figure 1b and table 1 of the paper, 128 blocks of 256 tokens, each pattern with about 10 blocks a row."""
    power, sliding, stride, dilated, longnet = (
        PowerPattern(),
        SlidingPattern(256, 9, 1),
        StridePattern(256, 6, 1, 32),
        DilatedPattern(256, 10, 2),
        LongNetPattern(256),
    )
    assert power.receptive_field(128, 6).round(3).tolist() == [0.078, 0.273, 0.586, 0.859, 0.984, 1.0]
    assert longnet.receptive_field(128, 7).round(3).tolist() == [0.062, 0.156, 0.32, 0.453, 0.586, 0.625, 0.625]
    patterns = (power, sliding, stride, dilated, longnet)
    assert [pattern.layers_to_cover(128) for pattern in patterns] == [6, 16, 8, None, None]
    assert [pattern.max_key_blocks(128) for pattern in patterns] == [10, 10, 10, 10, 13]
    assert [round(1 - pattern.density(32768), 3) for pattern in patterns] == [0.869, 0.857, 0.878, 0.863, 0.908]
    assert [round(power.density(length), 4) for length in (4096, 65536, 2**20)] == [0.6251, 0.0739, 0.0066]


def test_head_shifts_give_longnet_a_wider_field() -> None:
    plain = LongNetPattern(256)
    shifted = LongNetPattern(256, head_shift=True, num_heads=16)
    assert not plain.per_head
    assert shifted.per_head
    assert shifted.receptive_field(128, 4)[3] > plain.receptive_field(128, 4)[3]
    assert shifted.key_blocks(100, 0) == plain.key_blocks(100)


def test_a_pattern_of_distances_a_head_is_that_of_each_head() -> None:
    pattern = HeadDistancePattern(4, ((0, 1), (0, 2, 9)), 1)
    assert pattern.per_head
    for head in pattern.heads:
        alone = DistancePattern(4, pattern.distances[head], 1)
        assert (pattern.mask(20, head) == alone.mask(20)).all()


def test_a_million_tokens_take_no_time() -> None:
    start = time.perf_counter()
    pattern = PowerPattern()
    assert pattern.layers_to_cover(4096) == 11
    assert pattern.reach(4096, 40)[-1].all()
    assert pattern.max_key_blocks(4096) == 15
    assert FullPattern(256).layers_to_cover(4096) == 1
    assert time.perf_counter() - start < 2


def test_patterns_are_hashable_and_differ_by_kind() -> None:
    assert len({PowerPattern(4, 2, 1), SlidingPattern(4, 2, 1), PowerPattern(4, 2, 1)}) == 2


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: PowerPattern(block=0), "block=0"),
        (lambda: PowerPattern(window=0), "window=0"),
        (lambda: PowerPattern(sinks=-1), "sinks=-1"),
        (lambda: PowerPattern(window=2.5), "window=2.5"),
        (lambda: SlidingPattern(4, 0, 0), "window=0"),
        (lambda: StridePattern(4, 1, 0, 0), "stride=0"),
        (lambda: DilatedPattern(4, 1, 0), "dilation=0"),
        (lambda: DistancePattern(4, (1, 2), 0), "distances="),
        (lambda: DistancePattern(4, (0, 2, 2), 0), "distances="),
        (lambda: DistancePattern(4, (0, -2), 0), "distances=-2"),
        (lambda: HeadDistancePattern(4, (), 0), "distances="),
        (lambda: HeadDistancePattern(4, ((0, 1), (1, 2)), 0), "distances="),
        (lambda: HeadDistancePattern(4, ((0, 1), ()), 0), "distances="),
        (lambda: HeadDistancePattern(4, ((0, 1), (0, 3, 2)), 0), "distances="),
        (lambda: HeadDistancePattern(4, ((0,),), -1), "sinks=-1"),
        (lambda: PowerPattern(base=1), "base=1"),
        (lambda: PowerPattern(farthest=4), "farthest=4"),
        (lambda: RulerPattern(4, 1, 0, keep=0, levels=3), "keep=0"),
        (lambda: LongNetPattern(4, ((8, 2),)), "segments="),
        (lambda: LongNetPattern(4, ((0, 1),)), "length=0"),
        (lambda: LongNetPattern(4, num_heads=0), "num_heads=0"),
        (lambda: PowerPattern().density(0), "length=0"),
        (lambda: PowerPattern().layers_to_cover(0), "num_blocks=0"),
    ],
)
def test_bad_parameters_are_named(build, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build()


def test_importing_patterns_imports_neither_numpy_nor_torch() -> None:
    code = "import sys, sparsetrain.patterns; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
