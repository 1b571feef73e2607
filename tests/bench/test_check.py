from __future__ import annotations

import math

import pytest
import torch
from sparsetrain_kernels import causal_attention

from sparsetrain.bench.check import Check, answer, oracle, relative_error, relative_errors
from sparsetrain.bench.contenders import dense, ours
from sparsetrain.bench.contenders.base import PACKED, TOKENS_FIRST, Layout, Prepared, fitting
from sparsetrain.bench.problem import PatternProblem
from sparsetrain.patterns import PowerPattern


def problem(documents: tuple[int, ...] | None = None, batch: int = 1) -> PatternProblem:
    pattern = PowerPattern(16, 2, 1)
    return PatternProblem(200, 4, 2, 16, torch.float32, torch.device("cpu"), batch, documents, pattern=pattern)


@pytest.mark.parametrize("documents", [None, (120, 1, 79)])
@pytest.mark.parametrize("name", ["ours", "sdpa"])
def test_what_runs_on_a_cpu_agrees_with_the_oracle(name, documents):
    case = problem(documents)
    tensors = case.tensors()
    opponent = fitting((*ours.PATTERN, *dense.CAUSAL), "cpu", packed=documents is not None)[name]
    got = answer(opponent.prepare(case, tensors), tensors)
    assert max(relative_errors(got, oracle(case, tensors, opponent.sparse))) < 1e-5
    # And the two definitions differ, so that a mix-up would be seen.
    assert max(relative_errors(got, oracle(case, tensors, not opponent.sparse))) > 0.1


@pytest.mark.parametrize(("layout", "batch"), [(TOKENS_FIRST, 2), (PACKED, 1)])
def test_layouts_bring_output_and_gradients_back(layout: Layout, batch: int):
    case = problem(batch=batch)
    tensors = case.tensors()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return layout.arrange(causal_attention(*map(layout.restore, (query, key, value))))

    got = answer(Prepared(attend, layout), tensors)
    assert max(relative_errors(got, oracle(case, tensors, sparse=False))) < 1e-5


def test_gradients_of_repeated_heads_are_summed():
    case = problem()
    tensors = case.tensors()
    prepared = Prepared(lambda *inputs: causal_attention(*inputs), repeat=2)
    assert prepared.leaves(tensors)[0][1].shape[1] == 4
    got = answer(prepared, tensors)
    assert max(relative_errors(got, oracle(case, tensors, sparse=False))) < 1e-5


def test_one_wrong_tile_is_not_averaged_away():
    want = torch.randn(1, 32, 128 * 64, 8)
    got = want.clone()
    got[:, 7, 1280:1408] = 0
    assert float((got - want).norm() / want.norm()) < 0.025
    assert relative_error(got, want) == pytest.approx(math.sqrt(1 / 32), rel=0.1)


def test_a_nan_and_a_comparison_that_failed_do_not_pass():
    assert Check("flex", 1, "ours", 1e-2, (1e-3, 1e-2)).passed
    assert not Check("flex", 1, "ours", 1e-2, (1e-3, 2e-2)).passed
    assert not Check("flex", 1, "ours", 1e-2, (1e-3, math.nan)).passed
    assert not Check("flex", 1, "ours", 1e-2, reason="out of memory").passed
