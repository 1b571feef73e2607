"""The gradient of queries as a sum of integers: the kernels before and after the fused one in Triton's interpreter, and
in place of it the same parts of the sum in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from sparsetrain_kernels import block_pattern_attention_dense
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.block_pattern.pattern import block_lists
from sparsetrain_kernels.inputs import check_inputs

from sparsetrain.patterns import HeadDistancePattern, PowerPattern

if INTERPRETING:
    from sparsetrain_kernels.block_pattern.triton.query_sum import QuerySum
    from sparsetrain_kernels.block_pattern.triton.work import work_items

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter, on machines without a GPU")
TILE, HEADS, ROWS = 16, 2, 141
POWER = PowerPattern(32, 1, 1)
PACKED = torch.tensor([0, 1, 12, 12, 141], dtype=torch.int32)


def bounds(cu_seqlens) -> list[int]:
    return [0, ROWS] if cu_seqlens is None else cu_seqlens.tolist()


def visible(pattern, cu_seqlens, head: int) -> torch.Tensor:
    mask = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    for start, end in pairwise(bounds(cu_seqlens)):
        for row in range(end - start):
            for block in pattern.key_blocks(row // pattern.block, head):
                low, high = block * pattern.block, min((block + 1) * pattern.block, row + 1)
                mask[start + row, start + low : start + high] = True
    return mask


class Backward:
    """One problem, with the part of dQ that each key tile has, and the whole as autograd has it, in fp64."""

    def __init__(self, pattern, make_inputs, *, cu_seqlens=None, grad_lse=False, change=None) -> None:
        tensors = [tensor.detach() for tensor in make_inputs(HEADS, HEADS, ROWS)]
        generator = torch.Generator().manual_seed(2)
        self.grad = torch.randn(tensors[0].shape, generator=generator)
        for tensor, factor in (change or {}).items():
            [*tensors, self.grad][tensor].mul_(factor)
        query, key, value = (tensor.double().requires_grad_() for tensor in tensors)
        self.call = check_inputs(*tensors, cu_seqlens=cu_seqlens)
        self.lists = block_lists(pattern, -(-ROWS // pattern.block), HEADS)
        self.items, _ = work_items(self.call, self.lists, ROWS, ROWS, 0, TILE, 0)
        out, lse = block_pattern_attention_dense(query, key, value, pattern, cu_seqlens=cu_seqlens)
        self.out, self.lse = out.detach().float(), lse.detach().float()
        self.grad_lse = torch.randn(lse.shape, generator=generator) if grad_lse else None
        cotangents = [self.grad.double(), torch.zeros_like(lse) if self.grad_lse is None else self.grad_lse.double()]
        (self.wanted,) = torch.autograd.grad((out, lse), query, cotangents)
        delta = (out * cotangents[0]).sum(-1) - cotangents[1]
        mask = torch.stack([visible(pattern, cu_seqlens, head) for head in range(HEADS)])
        weights = (query @ key.mT * self.call.scale - lse[..., None]).exp().masked_fill(~mask, 0.0)
        slopes = weights * (cotangents[0] @ value.mT - delta[..., None])
        cuts = range(0, ROWS, TILE)
        self.parts = [(slopes[..., i : i + TILE] @ key[:, :, i : i + TILE]).detach() for i in cuts]

    def run(self, skip: int = -1) -> tuple[torch.Tensor, int]:
        """The gradient, and the largest number that the integers came to at any time."""
        delta = torch.full_like(self.lse, float("nan"))
        grads, outputs = (self.grad, self.grad_lse), (self.out, self.lse)
        total = QuerySum(self.call, self.lists, self.items, TILE, grads, outputs, delta)
        assert not total.integers.any()
        block = self.lists.block
        rows = [
            torch.arange(high - low) + (low // block + i) * block
            for i, (low, high) in enumerate(pairwise(bounds(self.call.cu_seqlens)))
        ]
        scale = total.scale[:, :, torch.cat(rows), None].double()
        integers, peak = torch.zeros(self.out.shape, dtype=torch.int64), 0
        for i, part in enumerate(self.parts):
            if i != skip:
                integers += (part * scale).round().nan_to_num(0.0).long()
                peak = max(peak, int(integers.abs().max()))
        total.integers += integers.int()
        grad_query = torch.full_like(self.out, float("nan"))
        total.finish(grad_query, None)
        assert delta.isfinite().any()
        return grad_query, peak


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["one", "packed"])
@pytest.mark.parametrize("pattern", [POWER, HeadDistancePattern(16, ((0, 1, 4), (0, 3)), 1)], ids=repr)
def test_the_sum_is_the_gradient_of_queries(pattern, cu_seqlens, make_inputs) -> None:
    problem = Backward(pattern, make_inputs, cu_seqlens=cu_seqlens, grad_lse=True)
    grad_query, peak = problem.run()
    assert error(grad_query, problem.wanted) < 1e-6
    assert 2**20 < peak < 2**30


WILD = torch.tensor([30.0] + [1.0] * 15)
CHANGES = {
    "saturated rows": {0: 12.0},
    "one wild channel": {1: WILD, 2: WILD, 3: WILD},
    "gradients whose squares vanish": {3: 1e-24},
    "gradients whose squares overflow": {2: 1e24},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_input_overflows_it(change, make_inputs) -> None:
    problem = Backward(POWER, make_inputs, change=change)
    grad_query, peak = problem.run()
    assert peak < 2**30
    assert error(grad_query, problem.wanted) < 1e-5


def test_a_part_left_out_is_noticed(make_inputs) -> None:
    problem = Backward(POWER, make_inputs)
    assert error(problem.run(skip=5)[0], problem.wanted) > 1e-2


@pytest.mark.parametrize(("place", "value"), [("key", "nan"), ("value", "inf"), ("grad", "nan")])
def test_what_is_no_number_reaches_the_rows_that_read_it_and_no_others(place, value, make_inputs) -> None:
    problem = Backward(POWER, make_inputs)
    row = 52
    tensor = problem.grad if place == "grad" else getattr(problem.call, place)
    tensor[0, 0, row, 3] = float(value)
    lost = problem.run()[0].isnan().all(-1)[0]
    reads = torch.arange(ROWS) == row
    if place != "grad":
        reads = visible(POWER, None, 0)[:, row]
        reads[row // TILE * TILE : row] = True  # a tile is multiplied as a whole
    assert torch.equal(lost[0], reads)
    assert not lost[1].any()
