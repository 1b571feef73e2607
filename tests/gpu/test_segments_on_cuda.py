"""Attention over lists of keys, attention of chosen rows and their choice, on a CUDA device against fp64 oracles."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attention_oracle import FLOOR, make_inputs, outputs_and_gradients, worst_error
from listed_cases import Case, make_case
from sparsetrain_kernels import (
    causal_attention,
    causal_attention_dense,
    listed_attention,
    listed_attention_dense,
    top_k_keys,
)
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("out", "lse", "grad query", "grad key", "grad value")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def finite(attention: Any) -> Any:
    """Rows that are not computed have a log-sum-exp of 0 instead of -inf."""

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(*tensors)
        return out, torch.where(lse.isfinite(), lse, 0)

    return run


def assert_close(attention: Any, oracle: Any, tensors: tuple[Tensor, ...]) -> None:
    """Within twice the error of the oracle in the same dtype, both against fp64, in the worst 16 rows."""
    exact = outputs_and_gradients(oracle, tuple(t.double() for t in tensors))
    eager = outputs_and_gradients(oracle, tensors)
    ours = outputs_and_gradients(attention, tensors)
    again = outputs_and_gradients(attention, tensors)
    for name, actual, repeated, yardstick, truth in zip(NAMES, ours, again, eager, exact, strict=True):
        limit = max(2 * worst_error(yardstick, truth), FLOOR[tensors[0].dtype])
        assert worst_error(actual, truth) <= limit, f"{name}: {worst_error(actual, truth):.2e} > {limit:.2e}"
        assert torch.equal(actual, repeated), f"{name} has other bits in a repetition"


def on_cuda(case: Case) -> Case:
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in case.options.items()}
    lists, counts, cu = (tensor.cuda() for tensor in case.lists)
    query, key, value = (tensor.detach().cuda() for tensor in case.trained)
    return Case((query, key, value), (lists, counts, cu), options)


LISTED: dict[str, dict[str, Any]] = {
    "segments of 32": {"sizes": (32,), "capacity": 200},
    "segments of 16": {"sizes": (16,), "capacity": 150, "sinks": 4, "window": 20},
    "ragged, prefix": {"sizes": (1, 8, 33, 64), "capacity": 90, "prefix": 100},
    "packed granules": {"bounds": (0, 1, 300, 300, 700), "granule": 8, "capacity": 20, "sinks": 3, "window": 9},
    "batch": {"batch": 2, "sizes": (24,), "capacity": 70, "skip": 0},
    "one head each": {"query_heads": 2, "capacity": 70, "sizes": (40,)},
    "groups of 7": {"query_heads": 14, "capacity": 70},
}


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", LISTED)
def test_attention_over_lists_equals_the_oracle(name: str, head_dim: int, dtype: torch.dtype) -> None:
    case = on_cuda(make_case(**{"query_heads": 8, "tokens": 700, **LISTED[name]}, head_dim=head_dim, dtype=dtype))
    ours = finite(lambda *t: listed_attention(*t, *case.lists, **case.options, return_lse=True, backend="triton"))
    oracle = finite(lambda *t: listed_attention_dense(*t, *case.lists, **case.options))
    assert_close(ours, oracle, case.trained)


def test_parts_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain_kernels.listed_keys.triton import launch

    case = on_cuda(make_case(8, tokens=700, capacity=100, sizes=(32,), head_dim=128, dtype=torch.bfloat16))
    ours = finite(lambda *t: listed_attention(*t, *case.lists, **case.options, return_lse=True))
    whole = outputs_and_gradients(ours, case.trained)
    monkeypatch.setattr(launch, "PARTIAL_BYTES", 2**18)
    assert_close(ours, finite(lambda *t: listed_attention_dense(*t, *case.lists, **case.options)), case.trained)
    assert torch.equal(outputs_and_gradients(ours, case.trained)[2], whole[2])


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="its kernel is for Hopper"
)
BACKENDS = pytest.mark.parametrize("backend", ["triton", pytest.param("gluon", marks=HOPPER)])


@DTYPES
@BACKENDS
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("bounds", [None, (0, 1, 300, 300, 700)], ids=["one", "packed"])
def test_chosen_rows_equal_the_oracle(bounds: Any, head_dim: int, backend: str, dtype: torch.dtype) -> None:
    if backend == "gluon" and (head_dim == 80 or dtype == torch.float32):
        pytest.skip("no such kernel")
    chosen = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:190].sort()[0].int().cuda()
    tensors = tuple(t.detach() for t in make_inputs(8, 2, 190, 700, head_dim=head_dim, dtype=dtype, device="cuda"))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    options = {"query_positions": chosen, "cu_seqlens": cu_seqlens}
    assert_close(
        partial(causal_attention, **options, return_lse=True, backend=backend),
        partial(causal_attention_dense, **options),
        tensors,
    )


CHOSEN: dict[str, dict[str, Any]] = {
    "one": {"places": [699]},
    "all": {"places": range(700)},
    "none at the end": {"places": range(0, 400, 3)},
    "groups of 7": {"places": range(5, 700, 2), "heads": (7, 1)},
    "one head each": {"places": range(5, 700, 9), "heads": (3, 3)},
    "batch": {"places": range(0, 700, 7), "batch": 2},
}


@BACKENDS
@pytest.mark.parametrize("name", CHOSEN)
def test_any_rows_may_be_chosen(name: str, backend: str) -> None:
    case = {"heads": (8, 2), "batch": 1, **CHOSEN[name]}
    chosen = torch.tensor(case["places"], dtype=torch.int32, device="cuda")
    shape = {"batch": case["batch"], "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    tensors = tuple(t.detach() for t in make_inputs(*case["heads"], len(chosen), 700, **shape))
    assert_close(
        partial(causal_attention, query_positions=chosen, return_lse=True, backend=backend),
        partial(causal_attention_dense, query_positions=chosen),
        tensors,
    )


@BACKENDS
def test_keys_that_no_row_sees_are_not_read(backend: str) -> None:
    bounds = torch.tensor([0, 30, 110, 300], dtype=torch.int32, device="cuda")
    chosen = torch.tensor([40, 60, 200], dtype=torch.int32, device="cuda")
    tensors = tuple(t.detach() for t in make_inputs(8, 2, 3, 300, head_dim=128, dtype=torch.bfloat16, device="cuda"))
    attend = partial(causal_attention, query_positions=chosen, cu_seqlens=bounds, return_lse=True, backend=backend)
    clean = outputs_and_gradients(attend, tensors)
    for tensor in tensors[1:]:
        tensor[:, :, 201:] = tensor[:, :, :30] = tensor[:, :, 61:110] = float("nan")
    dirty = outputs_and_gradients(attend, tensors)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("bounds", [None, (0, 1, 3000, 3000, 9000)], ids=["one", "packed"])
def test_chosen_keys_are_the_heaviest(bounds: Any) -> None:
    tokens, k = 9000, 300
    chosen = torch.arange(5, tokens, 31, dtype=torch.int32, device="cuda")
    shape = {"head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = (t.detach() for t in make_inputs(8, 2, len(chosen), tokens, **shape))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    options = {"query_positions": chosen, "cu_seqlens": cu_seqlens}
    _, lse = causal_attention(query, key, value, **options, return_lse=True)
    found = top_k_keys(query, key, lse, k, **options)
    starts = torch.tensor(bounds or (0,), device="cuda")
    for row in range(0, len(chosen), 17):
        place = int(chosen[row])
        start = int(starts[starts <= place].max())
        keys = key[0, :, None, start : place + 1].double()
        weights = (query[0, :, row].double().unflatten(0, (2, 4)).unsqueeze(2) @ keys.mT).squeeze(2) * 128**-0.5
        pooled = (weights - lse[0, :, row].double().unflatten(0, (2, 4))[..., None]).amax(1)
        pooled = torch.nn.functional.max_pool1d(pooled, 7, 1, 3)
        count = min(k, place + 1 - start)
        assert found.counts[0, :, row].tolist() == [count, count]
        for head in range(2):
            listed = found.lists[0, head, row, :count].long()
            assert (listed.diff() > 0).all()
            least = pooled[head].sort(descending=True)[0][count - 1]
            assert (pooled[head, listed] >= least - 0.02).all()


@pytest.mark.parametrize(
    ("heads", "head_dim"), [((8, 2), 128), ((8, 1), 64), ((2, 2), 128), ((6, 2), 64), ((14, 2), 128)], ids=str
)
@pytest.mark.parametrize("bounds", [None, (0, 1, 3000, 3000, 9000)], ids=["one", "packed"])
def test_chosen_keys_are_those_of_plain_pytorch(bounds: Any, heads: Any, head_dim: int) -> None:
    """Products of small integers have no rounding, and many of them are equal."""
    torch.manual_seed(0)
    chosen = torch.arange(5, 9000, 131, dtype=torch.int32, device="cuda")
    query = torch.randint(-2, 3, (1, heads[0], len(chosen), head_dim), device="cuda").bfloat16()
    key = torch.randint(-2, 3, (1, heads[1], 9000, head_dim), device="cuda").bfloat16()
    lse = torch.randint(0, 9, query.shape[:3], device="cuda").float()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    options = {"query_positions": chosen, "cu_seqlens": cu_seqlens, "scale": 0.25, "sinks": 3, "window": 40}
    ours = top_k_keys(query, key, lse, 300, **options, backend="triton")
    plain = top_k_keys(query, key, lse, 300, **options, backend="reference")
    assert torch.equal(ours.counts, plain.counts)
    assert torch.equal(ours.dropped, plain.dropped)
    inside = torch.arange(300, device="cuda") < plain.counts[..., None]
    assert torch.equal(ours.lists[inside], plain.lists[inside])
