"""FlashAttention 4 with lists of blocks: what it is given is the pattern, and a version with a race is refused."""

from __future__ import annotations

import sys
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sparsetrain_kernels import block_pattern_attention

from sparsetrain.bench.check import answer
from sparsetrain.bench.contenders import fa4
from sparsetrain.bench.contenders.flex import FLEX
from sparsetrain.bench.contenders.tiles import tile_lists
from sparsetrain.bench.measure import Unavailable
from sparsetrain.bench.problem import PatternProblem
from sparsetrain.patterns import PowerPattern, StridePattern


@pytest.mark.parametrize("pattern", [PowerPattern(256), PowerPattern(128, 2, 0), StridePattern(384, 1, 1, 3)])
@pytest.mark.parametrize("length", [1, 128, 1000, 4096])
def test_tile_lists_are_the_mask_of_the_pattern(pattern, length):
    lists = tile_lists(pattern, length)
    tiles, ratio = -(-length // 128), pattern.block // 128
    listed = np.zeros((tiles, tiles), dtype=bool)
    for row in range(tiles):
        full = lists.full[0, 0, row, : lists.full_counts[0, 0, row]].tolist()
        assert full == sorted(set(full))
        listed[row, full] = True
        assert not listed[row, row]
        assert lists.partial[0, 0, row, : lists.partial_counts[0, 0, row]].tolist() == [row]
        listed[row, row] = True
    blocks = pattern.mask(-(-tiles // ratio))
    want = np.tril(blocks.repeat(ratio, 0).repeat(ratio, 1)[:tiles, :tiles])
    assert (listed == want).all()
    assert lists.full.shape[3] == max(int(lists.full_counts.max()), 1)

    by_key = lists.by_key_tile()
    read_by = np.zeros_like(listed)
    for key_tile in range(tiles):
        queries = by_key.full[0, 0, key_tile, : by_key.full_counts[0, 0, key_tile]].tolist()
        assert queries == sorted(set(queries))
        read_by[queries, key_tile] = True
        assert by_key.partial[0, 0, key_tile].tolist() == [key_tile]
    assert (read_by == np.tril(want, -1)).all()


def test_blocks_that_are_not_made_of_tiles_are_refused_with_the_reason():
    with pytest.raises(Unavailable, match="128 tokens; a block of 192"):
        tile_lists(PowerPattern(192), 1024)


class Cute:
    """In place of FlashAttention 4: its lists as the mask of torch's attention."""

    Lists = namedtuple("Lists", "mask_block_cnt mask_block_idx full_block_cnt full_block_idx block_size")

    def tiles(self, lists) -> torch.Tensor:
        assert lists.block_size == (128, 128)
        count = lists.full_block_cnt.shape[2]
        listed = torch.zeros(count, count, dtype=torch.bool)
        for kind in ("mask", "full"):
            counts, indices = getattr(lists, f"{kind}_block_cnt"), getattr(lists, f"{kind}_block_idx")
            for row in range(count):
                listed[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
        return listed

    def flash_attn_func(self, query, key, value, *, causal, block_sparse_tensors, block_sparse_tensors_bwd):
        listed = self.tiles(block_sparse_tensors)
        assert torch.equal(self.tiles(block_sparse_tensors_bwd), listed.T)
        tokens = query.shape[1]
        mask = listed.repeat_interleave(128, 0).repeat_interleave(128, 1)[:tokens, :tokens]
        mask &= torch.ones_like(mask).tril() if causal else True
        inputs = [each.transpose(1, 2) for each in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2), None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    def install(version: str) -> None:
        cute = Cute()
        monkeypatch.setattr(fa4, "flash_attn_cute", lambda: cute)
        monkeypatch.setattr(fa4.importlib.metadata, "version", lambda name: version)
        block_sparsity = SimpleNamespace(BlockSparseTensorsTorch=Cute.Lists)
        modules = ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity")
        for name in modules:
            monkeypatch.setitem(sys.modules, name, block_sparsity)

    return install


@pytest.mark.parametrize("length", [1280, 1400])
def test_flash_attention_4_is_given_the_pattern(installed, length: int) -> None:
    installed("4.0.0b36")
    problem = PatternProblem(
        length, 4, 2, 16, torch.float32, torch.device("cpu"), pattern=PowerPattern(256, window=2, sinks=1)
    )
    tensors = problem.tensors()
    prepared = fa4.BLOCKS.prepare(problem, tensors)
    assert prepared.mask_ms is not None
    got = answer(prepared, tensors)
    inputs = [each.detach().requires_grad_() for each in tensors[:3]]
    out = block_pattern_attention(*inputs, problem.pattern, backend="reference")
    want = (out, *torch.autograd.grad(out, inputs, tensors.upstream))
    for ours, theirs in zip(got[:4], want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("opponent", [fa4.BLOCKS, *(each for each in FLEX if each.name == "flex-flash")])
def test_a_flash_attention_4_with_a_race_in_its_gradients_is_no_opponent(installed, opponent) -> None:
    installed("4.0.0b35")
    with pytest.raises(Unavailable, match=r"4\.0\.0b35 has a race .* install 4\.0\.0b36 or newer"):
        opponent.prepare(None, None)
