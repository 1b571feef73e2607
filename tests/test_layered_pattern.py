"""Variants of PowerAttention: layers that differ reach what the product of their masks reaches, and all reach all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsetrain.layered_pattern import LayeredPattern
from sparsetrain.methods.registry import parse_attention
from sparsetrain.patterns import DistancePattern, Pattern, PowerPattern, SlidingPattern

LAYERED = LayeredPattern(4, (SlidingPattern(4, 2, 1), DistancePattern(4, (0, 1, 4), 0), DistancePattern(4, (0, 9), 0)))


def layer_mask(pattern: Pattern, layer: int, num_blocks: int) -> np.ndarray:
    """Which blocks a block reads in a layer, with any head."""
    own = pattern.by_layer[layer % len(pattern.by_layer)]
    return np.any([own.mask(num_blocks, head) for head in own.heads], axis=0)


def stack(pattern: Pattern, num_blocks: int, num_layers: int) -> np.ndarray:
    """Which blocks each block depends on after so many layers."""
    reached = np.eye(num_blocks, dtype=np.float32)
    for layer in range(num_layers):
        reached = (layer_mask(pattern, layer, num_blocks).astype(np.float32) @ reached > 0).astype(np.float32)
    return reached > 0


@pytest.mark.parametrize("num_blocks", [1, 5, 33])
def test_reach_is_the_boolean_product_of_the_layers_masks(num_blocks: int) -> None:
    for layers in range(1, 8):
        reach = LAYERED.reach(num_blocks, 7)
        assert (reach[layers - 1] == stack(LAYERED, num_blocks, layers)[-1]).all()
    dense = LAYERED.reach(num_blocks, 7, dense_layers=[2])
    assert (dense[:2] == reach[:2]).all()
    assert dense[2:].all()


def test_layers_to_cover_is_the_first_full_layer_or_none() -> None:
    holes = LayeredPattern(4, (DistancePattern(4, (0, 2), 0), DistancePattern(4, (0, 4), 0)))
    for pattern, num_blocks in ((LAYERED, 1), (LAYERED, 20), (LAYERED, 40), (holes, 1), (holes, 12)):
        full = [layer for layer in range(1, 20) if stack(pattern, num_blocks, layer)[-1].all()]
        assert pattern.layers_to_cover(num_blocks) == (full[0] if full else None)


@pytest.mark.parametrize(
    ("section", "layers", "blocks_read"),
    [
        ({"method": "power"}, {128: 6, 512: 8}, {128: 10, 512: 12}),
        ({"method": "power", "split": "layers", "farthest": 64}, {128: 6}, {128: 7}),
        ({"method": "power", "split": "layers", "farthest": 256}, {128: 6, 512: 8}, {128: 7, 512: 7}),
        ({"method": "power", "split": "heads", "farthest": 256}, {128: 6, 512: 8}, {128: 7, 512: 8}),
        ({"method": "power", "base": 4}, {128: 4, 512: 5}, {128: 12, 512: 15}),
        ({"method": "ruler"}, {128: 6, 512: 8}, {128: 10, 512: 12}),
        ({"method": "ruler", "keep": 3}, {128: 4, 512: 5}, {128: 15, 512: 19}),
    ],
)
def test_every_earlier_block_is_reached_in_the_stated_layers(
    section: dict[str, Any], layers: dict[int, int], blocks_read: dict[int, int]
) -> None:
    """The figures of docs/static-patterns.md, window 5 and a sink, for a model of four KV heads; from every block."""
    pattern = parse_attention(section).pattern(4)
    assert pattern is not None
    for num_blocks, needed in layers.items():
        assert pattern.max_key_blocks(num_blocks) == blocks_read[num_blocks]
        assert (stack(pattern, num_blocks, needed) == np.tri(num_blocks, dtype=bool)).all()
        assert pattern.layers_to_cover(num_blocks) == needed


def test_a_ruler_reads_nothing_again_that_it_did_not_read_in_the_block_before() -> None:
    """What generation drops is never needed again, and so little is kept for ever."""
    pattern = parse_attention({"method": "ruler"}).pattern()
    assert pattern is not None
    before: set[int] = set()
    for block in range(2000):
        read = set(pattern.key_blocks(block))
        assert read <= before | {block}
        before = read
    power = PowerPattern()
    assert not set(power.key_blocks(40)) <= set(power.key_blocks(39)) | {40}


def test_density_is_the_mean_of_layers_and_heads() -> None:
    for split in ("layers", "heads"):
        section = {"method": "power", "block": 4, "window": 2, "split": split, "farthest": 8}
        pattern = parse_attention(section).pattern(3)
        assert pattern is not None
        masks = [part.token_mask(70, 70, head=head) for part in pattern.by_layer for head in part.heads]
        assert pattern.mean_density(70) == pytest.approx(np.mean([mask.sum() for mask in masks]) / (70 * 71 / 2))


def test_heads_share_the_distances_out_and_neighbours_read_alike() -> None:
    power = parse_attention({"method": "power", "window": 3, "split": "heads", "farthest": 16})

    def far(heads: int) -> list[tuple[int, ...]]:
        pattern: Any = power.pattern(heads)
        return [distances[3:] for distances in pattern.distances]

    assert far(1) == [(4, 8, 16)]
    assert far(2) == [(4, 16), (8,)]
    assert far(3) == [(4,), (8,), (16,)]
    assert far(8) == [(4,), (4,), (4,), (8,), (8,), (8,), (16,), (16,)]


def test_what_a_layer_reads_is_not_asked_of_all_layers() -> None:
    for ask in (lambda: LAYERED.key_blocks(3), lambda: LAYERED.query_blocks(3, 9), lambda: LAYERED.listed(9)):
        with pytest.raises(TypeError, match="ask one of by_layer"):
            ask()
    with pytest.raises(ValueError, match="all in blocks of 8"):
        LayeredPattern(8, (SlidingPattern(4, 2, 1),))
