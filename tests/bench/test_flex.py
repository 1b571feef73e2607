from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from sparsetrain_kernels import block_pattern_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from sparsetrain.bench.contenders import flex
from sparsetrain.bench.contenders.base import Prepared
from sparsetrain.bench.contenders.flex import FLEX, document_block_mask, document_mask, listed_block_mask
from sparsetrain.bench.measure import Unavailable
from sparsetrain.bench.problem import PatternProblem
from sparsetrain.patterns import PowerPattern

CPU = torch.device("cpu")


def problem(length: int, documents: tuple[int, ...] | None = None, block: int = 128) -> PatternProblem:
    pattern = PowerPattern(block, window=2, sinks=1)
    return PatternProblem(length, 4, 2, 16, torch.float32, CPU, documents=documents, pattern=pattern)


@pytest.mark.parametrize("length", [1280, 1400])
def test_block_mask_has_the_forward_lists_and_their_transpose(length):
    case = problem(length, block=256)
    mask = listed_block_mask(case.pattern, length, case.device)
    want = torch.from_numpy(PowerPattern(256, 2, 1).mask(-(-length // 256)).repeat(2, 0).repeat(2, 1)).tril()
    tiles = -(-length // 128)
    assert (mask.to_dense()[0, 0].bool() == want[:tiles, :tiles]).all()
    assert mask.seq_lengths == (length, length)
    transposed = torch.zeros(tiles, tiles, dtype=torch.bool)
    for counts, indices in ((mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices)):
        for key_tile in range(tiles):
            transposed[indices[0, 0, key_tile, : counts[0, 0, key_tile]].long(), key_tile] = True
    assert (transposed == want[:tiles, :tiles]).all()


@pytest.mark.parametrize("documents", [(1000,), (37, 1, 500, 462), (640, 360)])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 1), (5, 2)])
def test_document_predicate_is_the_pattern_within_each_document(documents, window, sinks):
    pattern = PowerPattern(32, window, sinks)
    got = create_mask(document_mask(pattern, documents, CPU), None, None, 1000, 1000, "cpu")[0, 0]
    want = torch.block_diag(*(torch.from_numpy(pattern.token_mask(n, n)) for n in documents)).bool()
    assert (got == want).all()


def test_document_block_mask_covers_what_is_visible():
    mask = document_block_mask(problem(1000, (700, 300), block=32), create_block_mask)
    visible = torch.block_diag(*(torch.from_numpy(PowerPattern(32, 2, 1).token_mask(n, n)) for n in (700, 300)))
    padded = torch.nn.functional.pad(visible, (0, 24, 0, 24)).unflatten(0, (8, 128)).unflatten(2, (8, 128))
    assert (mask.to_dense()[0, 0].bool() == padded.bool().any(dim=(1, 3))).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [None, (700, 1, 579)])
def test_flex_attention_with_these_masks_is_our_attention(documents, monkeypatch):
    def uncompiled(function: Any, **options: Any) -> Any:
        return function

    def listed(function: Any, *case: Any) -> BlockMask:
        """A block mask whose predicate also asks its lists: uncompiled, FlexAttention reads the predicate alone."""
        mask = function(*case)
        tiles, predicate = mask.to_dense()[0, 0].bool(), mask.mask_mod
        mask.mask_mod = lambda b, h, query, key: predicate(b, h, query, key) & tiles[query // 128, key // 128]
        return mask

    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(flex, "listed_block_mask", partial(listed, flex.listed_block_mask))
    case = problem(1280, documents)
    tensors = case.tensors()
    opponent = next(each for each in FLEX if each.name == "flex")
    prepared = opponent.prepare(case, tensors)
    assert prepared.mask_ms is not None
    got = prepared.attend(*tensors[:3])
    want = block_pattern_attention(*tensors[:3], case.pattern, cu_seqlens=case.cu_seqlens(), backend="reference")
    torch.testing.assert_close(got, want)


def test_a_torch_whose_kernels_do_not_load_by_tma_is_told_so(monkeypatch, tmp_path) -> None:
    (tmp_path / "templates").mkdir()
    for name in ("flex_attention.py.jinja", "flex_backwards.py.jinja"):
        (tmp_path / "templates" / name).write_text("tl.load")
    monkeypatch.setattr(flex, "files", lambda package: tmp_path)
    opponent = next(each for each in FLEX if each.name == "flex-tma")
    with pytest.raises(Unavailable, match="does not load by TMA"):
        opponent.prepare(None, None)
    (tmp_path / "templates/flex_attention.py.jinja").write_text("{%- if USE_TMA %}")
    asked = []
    monkeypatch.setattr(flex, "_flex", lambda *_: asked.append(_[2]) or Prepared(torch.add, note="mask"))
    assert opponent.prepare(None, None).note == "mask; TMA forward"
    assert asked == [{"USE_TMA": True}]
