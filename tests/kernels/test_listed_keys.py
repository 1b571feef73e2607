"""Attention over lists of keys equals the dense computation under the same mask, and reads nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_oracle import FLOOR, Attention, outputs_and_gradients, worst_error
from listed_cases import PACKED, Case, make_case, seen_keys
from sparsetrain_kernels import causal_attention_dense, listed_attention, listed_attention_dense
from sparsetrain_kernels.backend import INTERPRETING
from torch import Tensor

NAMES = ("out", "lse", "grad query", "grad key", "grad value")


def masked(query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention under a mask ``[B, Hkv, N, N]``; rows that see nothing give 0 and -inf."""
    some = visible.any(-1)
    logits = query.unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).mT * query.shape[3] ** -0.5
    logits = logits.to(torch.promote_types(query.dtype, torch.float32))
    logits = logits.masked_fill(~visible.unsqueeze(2) & some[:, :, None, :, None], float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp() * some[:, :, None, :, None]
    out = weights.to(value.dtype) @ value.unsqueeze(2)
    lse = lse.masked_fill(~some[:, :, None, :, None], float("-inf"))
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def results(attention: Attention, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Forward and gradients; of rows that are not computed the log-sum-exp is checked and left out."""

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(*leaves)
        return out, torch.where(lse.isfinite(), lse, 0)

    return outputs_and_gradients(run, tensors)


def listed(case: Case, backend: str = "reference") -> Attention:
    return lambda *t: listed_attention(*t, *case.lists, **case.options, return_lse=True, backend=backend)


def assert_equals_the_mask(case: Case, backend: str = "reference") -> None:
    """Within twice the error that the dense computation makes in the case's dtype, both against fp64."""
    visible = seen_keys(case)
    dense = partial(masked, visible=visible)
    exact = results(dense, tuple(t.double() for t in case.trained))
    eager = results(dense, case.trained)
    ours = results(listed(case, backend), case.trained)
    for name, actual, yardstick, truth in zip(NAMES, ours, eager, exact, strict=True):
        limit = max(2 * worst_error(yardstick, truth), FLOOR[case.trained[0].dtype])
        assert worst_error(actual, truth) <= limit, f"{name}: {worst_error(actual, truth):.2e} > {limit:.2e}"
    out, lse = listed(case, backend)(*case.trained)
    empty = ~visible[:, :1].any(-1).expand(lse.shape)
    assert torch.equal(lse.isneginf(), empty)
    assert not out[empty].any()


CASES: dict[str, dict[str, Any]] = {
    "segments": {},
    "batch": {"batch": 2, "window": 5},
    "prefix": {"prefix": 40, "sinks": 3},
    "nothing skipped": {"skip": 0, "window": 9, "sinks": 2},
    "granules": {"granule": 8, "capacity": 6, "sinks": 3, "window": 5},
    "packed": {"bounds": PACKED, "prefix": 4, "window": 6, "sinks": 2},
    "packed granules": {"bounds": PACKED, "granule": 8, "capacity": 5},
    "long segments": {"sizes": (50, 90), "window": 20},
    "groups": {"query_heads": 14, "tokens": 90},
    "head dim": {"head_dim": 24, "tokens": 90},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_masked_computation_exactly(name: str) -> None:
    assert_equals_the_mask(make_case(**CASES[name], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_masked_computation_in_every_dtype(dtype: torch.dtype) -> None:
    assert_equals_the_mask(make_case(**CASES["packed"], dtype=dtype))


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_has_the_mask_of_the_definition(name: str) -> None:
    case = make_case(**CASES[name], dtype=torch.float64)
    expected = results(partial(masked, visible=seen_keys(case)), case.trained)
    found = results(lambda *t: listed_attention_dense(*t, *case.lists, **case.options), case.trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def equal_results(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_equal_finite_differences() -> None:
    case = make_case(2, 1, 20, capacity=5, window=2, sinks=1, prefix=4, head_dim=3, dtype=torch.float64)
    computed = seen_keys(case)[0, 0].any(-1)

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = listed(case)(*tensors)
        return out, lse[:, :, computed]

    assert torch.autograd.gradcheck(attend, case.trained)


def test_a_repetition_has_the_same_bits() -> None:
    case = make_case(**CASES["packed"])
    assert equal_results(results(listed(case), case.trained), results(listed(case), case.trained))


def test_a_packed_document_has_the_bits_of_one_alone() -> None:
    case = make_case(**CASES["packed"], dtype=torch.float32)
    packed = results(listed(case), case.trained)
    cu = case.lists[2]
    for start, stop in pairwise(PACKED):
        if start == stop:
            continue
        own = (cu[:-1] >= start) & (cu[1:] <= stop) & (cu[1:] > cu[:-1])
        rows = slice(start, stop)
        tensors = tuple(t[:, :, rows] for t in case.trained)
        bounds = torch.cat((cu[:-1][own], cu.new_tensor([stop]))) - start
        lists = (case.lists[0][:, :, own], case.lists[1][:, :, own], bounds)
        options = {**case.options, "skip": case.options["skip"][own], "cu_seqlens": None}
        alone = Case(tensors, lists, options)
        # Cotangents are random: those of the whole, cut out.
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, lse = listed(alone)(*leaves)
        lse = torch.where(lse.isfinite(), lse, 0)
        assert torch.equal(out, packed[0][:, :, rows])
        assert torch.equal(lse, packed[1][:, :, rows])
        generator = torch.Generator().manual_seed(1)
        whole = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(out) for t in packed[:2]]
        grads = torch.autograd.grad((out, lse), leaves, [t[:, :, rows] for t in whole])
        assert equal_results(list(grads), [t[:, :, rows] for t in packed[2:]])


def test_the_order_of_a_list_does_not_matter() -> None:
    case = make_case(dtype=torch.float64)
    lists, counts, cu = case.lists
    turned = lists.clone()
    for place in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)):
        count = int(counts[tuple(place)])
        turned[tuple(place)][:count] = turned[tuple(place)][:count].flip(0)
    for one, other in zip(
        results(listed(case), case.trained),
        results(listed(case._replace(lists=(turned, counts, cu))), case.trained),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("granule", [1, 8])
def test_lists_of_all_keys_are_causal_attention(granule: int) -> None:
    case = make_case(capacity=-(-177 // granule), granule=granule, window=3, sinks=2, prefix=9, dtype=torch.float64)
    lists, counts, cu = case.lists
    every = torch.arange(lists.shape[3], dtype=torch.int32).expand(lists.shape).contiguous()
    case = case._replace(lists=(every, torch.full_like(counts, lists.shape[3]), cu))
    out, lse = listed(case)(*case.trained)
    expected, expected_lse = causal_attention_dense(*case.trained)
    computed = lse[0, 0].isfinite()
    torch.testing.assert_close(out[:, :, computed], expected[:, :, computed], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse[:, :, computed], expected_lse[:, :, computed], rtol=0, atol=1e-12)


def test_a_segment_of_skipped_rows_alone_computes_nothing() -> None:
    case = make_case(sizes=(1,))
    out, lse = listed(case)(*case.trained)
    assert not out.any()
    assert lse.isneginf().all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), case.trained))


@pytest.mark.parametrize("name", ["prefix", "packed", "granules", "long segments"])
def test_other_keys_are_not_read(name: str) -> None:
    case = make_case(**CASES[name])
    clean = results(listed(case), case.trained)
    assert equal_results(clean, results(listed(poisoned(case)), poisoned(case).trained))


def poisoned(case: Case) -> Case:
    """NaN in every key and value that no row sees, and in every row of the query that is not computed."""
    query, key, value = (t.detach().clone() for t in case.trained)
    seen = seen_keys(case)
    key[~seen.any(2)] = value[~seen.any(2)] = float("nan")
    query[:, :, ~seen[0, 0].any(-1)] = float("nan")
    return case._replace(trained=(query, key, value))


def test_a_row_changes_with_the_keys_it_sees_alone() -> None:
    case = make_case(prefix=12, dtype=torch.float64)
    seen = seen_keys(case)
    query, key, value = (t.detach() for t in case.trained)
    out = listed(case)(query, key, value)[0]
    for j in (0, 7, 30, 90, 150):
        changed = key.clone()
        changed[:, :, j] += 1.0
        moved = (listed(case)(query, changed, value)[0] != out).any(-1)
        # A row that sees one key alone has its value as its output.
        expected = (seen[..., j] & (seen.sum(-1) > 1)).repeat_interleave(2, 1)
        assert torch.equal(moved, expected)


def test_memory_grows_with_the_length_and_the_lists(monkeypatch: pytest.MonkeyPatch, largest_tensor) -> None:
    from sparsetrain_kernels.listed_keys import gathered

    monkeypatch.setattr(gathered, "CHUNK_ELEMENTS", 2**14)
    tokens, segments = 4096, 512
    trained = make_case(2, 1, tokens, sizes=(8,), head_dim=8).trained
    cu = torch.arange(0, tokens + 1, 8, dtype=torch.int32)
    lists = torch.randint(8, (1, 1, segments, 16), dtype=torch.int32)
    counts = torch.full((1, 1, segments), 16, dtype=torch.int32)
    run = lambda: listed_attention(*trained, lists, counts, cu, skip=1).sum().backward()  # noqa: E731
    assert largest_tensor(run) < tokens * tokens / 8 / 8


def interpreted(case: Case) -> Case:
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    return case


SMALL: dict[str, dict[str, Any]] = {
    "segments": {"tokens": 70, "capacity": 9},
    "batch": {"tokens": 50, "batch": 2, "window": 5},
    "prefix": {"tokens": 90, "prefix": 40, "sinks": 3},
    "nothing skipped": {"tokens": 70, "skip": 0, "window": 9, "sinks": 2},
    "granules": {"tokens": 90, "granule": 8, "capacity": 6, "sinks": 3, "window": 5},
    "packed": {"tokens": 100, "bounds": (0, 1, 12, 30, 30, 100), "prefix": 4, "window": 6, "sinks": 2},
    "long segments": {"tokens": 120, "sizes": (70,), "window": 20},
    "groups": {"query_heads": 14, "tokens": 50},
}


@pytest.mark.parametrize("name", SMALL)
def test_the_kernels_equal_the_masked_computation(name: str, poisoned_kernels) -> None:
    assert_equals_the_mask(interpreted(make_case(**SMALL[name])), "triton")


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_the_kernels_equal_it_in_half_precision(dtype: torch.dtype, poisoned_kernels) -> None:
    assert_equals_the_mask(interpreted(make_case(**SMALL["packed"], dtype=dtype)), "triton")


def test_the_kernels_do_not_read_other_keys(poisoned_kernels) -> None:
    case = interpreted(make_case(**SMALL["packed"]))
    clean = results(listed(case, "triton"), case.trained)
    assert equal_results(clean, results(listed(poisoned(case), "triton"), poisoned(case).trained))


def test_the_kernels_sum_parts_in_pieces(monkeypatch: pytest.MonkeyPatch, poisoned_kernels) -> None:
    from sparsetrain_kernels.listed_keys.triton import launch

    case = interpreted(make_case(tokens=60, capacity=9, sizes=(8,)))
    monkeypatch.setattr(launch, "PARTIAL_BYTES", 2**14)
    assert_equals_the_mask(case, "triton")


@pytest.fixture
def poisoned_kernels(poison_launches: Callable[..., None]) -> None:
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    from sparsetrain_kernels import row_statistics
    from sparsetrain_kernels.listed_keys.triton import launch, work

    poison_launches(launch, work, row_statistics)
