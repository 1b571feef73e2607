"""Causal attention of chosen rows equals those rows of the whole, and reads no later key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_oracle import assert_matches_oracle, make_inputs, outputs_and_gradients
from sparsetrain_kernels import causal_attention, causal_attention_dense, gather
from sparsetrain_kernels.backend import INTERPRETING
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PACKED = (0, 1, 12, 30, 30, 110, 300)
FORWARD = torch.ops.sparsetrain.causal_rows_fwd.default
BACKWARD = torch.ops.sparsetrain.causal_rows_bwd.default


def places(count: int, keys: int = 300) -> Tensor:
    """Some rows, the last one among them."""
    chosen = torch.randperm(keys - 1, generator=torch.Generator().manual_seed(2))[: count - 1].sort()[0]
    return torch.cat((chosen, torch.tensor([keys - 1]))).int()


def packed(bounds: tuple[int, ...] | None) -> Tensor | None:
    return None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


def rows_of(chosen: Tensor, bounds: tuple[int, ...] | None = None, backend: str = "reference") -> Callable[..., Any]:
    return partial(
        causal_attention, query_positions=chosen, cu_seqlens=packed(bounds), return_lse=True, backend=backend
    )


CASES: dict[str, dict[str, Any]] = {
    "some": {"count": 37},
    "one": {"count": 1},
    "all": {"count": 300},
    "packed": {"count": 90, "bounds": PACKED},
    "groups": {"count": 20, "query_heads": 7, "kv_heads": 1},
    "batch": {"count": 12, "batch": 2},
    "head dim": {"count": 30, "head_dim": 24},
}


def make_case(count: int, bounds: tuple[int, ...] | None = None, **options: Any) -> tuple[Any, Tensor, Any]:
    heads = options.pop("query_heads", 4), options.pop("kv_heads", 2)
    return make_inputs(*heads, count, 300, **options), places(count), bounds


@pytest.mark.parametrize("name", CASES)
def test_equals_those_rows_of_the_whole(name: str) -> None:
    (_, key, value), chosen, bounds = make_case(**CASES[name], dtype=torch.float64)
    query = make_inputs(2 * key.shape[1], 1, 300, batch=key.shape[0], head_dim=key.shape[3], dtype=torch.float64)[0]

    def some(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return rows_of(chosen, bounds)(query[:, :, chosen], key, value)

    def whole(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = causal_attention_dense(query, key, value, cu_seqlens=packed(bounds))
        return out[:, :, chosen], lse[:, :, chosen]

    found, expected = (outputs_and_gradients(f, (query, key, value)) for f in (some, whole))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str, dtype: torch.dtype) -> None:
    tensors, chosen, bounds = make_case(**CASES[name], dtype=dtype)
    oracle = partial(causal_attention_dense, query_positions=chosen, cu_seqlens=packed(bounds))
    assert_matches_oracle(rows_of(chosen, bounds), oracle, tensors)


def test_gradients_equal_finite_differences() -> None:
    tensors = make_inputs(2, 1, 6, 20, head_dim=5, dtype=torch.float64)
    chosen = torch.tensor([0, 3, 8, 9, 14, 19], dtype=torch.int32)
    assert torch.autograd.gradcheck(rows_of(chosen, (0, 9, 20)), tensors)


def test_a_packed_document_has_the_bits_of_one_alone() -> None:
    tensors, chosen, _ = make_case(90)
    whole = outputs_and_gradients(rows_of(chosen, PACKED), tensors)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in whole[:2]]
    for start, stop in pairwise(PACKED):
        own = ((chosen >= start) & (chosen < stop)).nonzero().flatten()
        if not len(own):
            continue
        rows, keys = slice(int(own[0]), int(own[-1]) + 1), slice(start, stop)
        leaves = [t.detach()[:, :, part].requires_grad_() for t, part in zip(tensors, (rows, keys, keys), strict=True)]
        found = rows_of(chosen[rows] - start)(*leaves)
        grads = torch.autograd.grad(found, leaves, [t[:, :, rows] for t in cotangents])
        for one, other, part in zip((*found, *grads), whole, (rows, rows, rows, keys, keys), strict=True):
            assert torch.equal(one, other[:, :, part])


def test_later_keys_and_other_documents_are_not_read() -> None:
    tensors, _, _ = make_case(3)
    chosen = torch.tensor([40, 60, 200], dtype=torch.int32)
    clean = outputs_and_gradients(rows_of(chosen, PACKED), tensors)
    with torch.no_grad():
        for tensor in tensors[1:]:
            tensor[:, :, 201:] = tensor[:, :, :30] = tensor[:, :, 61:110] = float("nan")
    dirty = outputs_and_gradients(rows_of(chosen, PACKED), tensors)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_the_operations_are_well_made_and_counted() -> None:
    tensors, chosen, bounds = make_case(**CASES["packed"])
    args = (*(t.detach().contiguous() for t in tensors), chosen, packed(bounds), 0.25, "reference")
    torch.library.opcheck(FORWARD, args)
    out, lse = FORWARD(*args)
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), torch.zeros_like(lse), out, lse, *args))
    pairs = sum(int(place) - max(start for start in PACKED if start <= place) + 1 for place in chosen)
    with FlopCounterMode(display=False) as counter:
        rows_of(chosen, bounds)(*tensors)[0].sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert counts["sparsetrain.causal_rows_fwd"] == 4 * 16 * 4 * pairs
    assert counts["sparsetrain.causal_rows_bwd"] == 10 * 16 * 4 * pairs


def test_it_compiles() -> None:
    tensors, chosen, bounds = make_case(**CASES["packed"])
    attend = torch.compile(rows_of(chosen, bounds), fullgraph=True, backend="aot_eager")
    ours, theirs = (outputs_and_gradients(f, tensors) for f in (attend, rows_of(chosen, bounds)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_square_tensor_is_built(monkeypatch: pytest.MonkeyPatch, largest_tensor) -> None:
    from sparsetrain_kernels.dense import row_reference

    monkeypatch.setattr(row_reference, "CHUNK_ELEMENTS", 2**15)
    tensors = make_inputs(2, 1, 512, 4096, head_dim=8)
    chosen = torch.arange(7, 4096, 8, dtype=torch.int32)
    assert largest_tensor(lambda: rows_of(chosen)(*tensors)[0].sum().backward()) < 512 * 4096 / 8
    assert gather.CHUNK_ELEMENTS > 2**15


QUERY, KEY = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 10, 8)
CHOSEN = torch.tensor([0, 4, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"query_positions": [0, 4, 9]}, "query_positions is a list"),
        ({"query_positions": CHOSEN.long()}, "query_positions has dtype torch.int64, expected torch.int32"),
        ({"query_positions": CHOSEN[:2]}, r"query_positions has shape \(2,\), expected one for each row"),
        ({"query_positions": CHOSEN.flip(0)}, r"query_positions=\[9, 4, 0\] must ascend within 0 to 9"),
        ({"query_positions": CHOSEN + 1}, "must ascend within 0 to 9"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, r"cu_seqlens=\[0, 3\] must rise from 0"),
        ({"window": 4}, "window=4 cannot be combined with query_positions"),
        ({"q_start": 0}, "q_start=0 cannot be combined"),
        ({"softcap": 2.0}, "softcap=2.0 cannot be combined"),
        ({"sink_logits": torch.zeros(4)}, "sink_logits=a tensor cannot be combined"),
        ({"backend": "gluon"}, "its kernels take fp16 and bf16, not torch.float32"),
        (dict(zip(("query", "key", "value"), (t.half() for t in (QUERY, KEY, KEY)))) | {"backend": "gluon"}, "not 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        causal_attention(**{"query": QUERY, "key": KEY, "value": KEY, "query_positions": CHOSEN, **wrong})


SMALL: dict[str, dict[str, Any]] = {
    "some": {"count": 37},
    "one": {"count": 1},
    "packed": {"count": 60, "bounds": PACKED},
    "groups": {"count": 20, "query_heads": 7, "kv_heads": 1},
    "batch": {"count": 12, "batch": 2},
    "head dim": {"count": 30, "head_dim": 24, "dtype": torch.float16},
}


@pytest.mark.parametrize("name", SMALL)
def test_the_kernels_equal_the_oracle(name: str, poisoned_kernels) -> None:
    tensors, chosen, bounds = make_case(**SMALL[name])
    oracle = partial(causal_attention_dense, query_positions=chosen, cu_seqlens=packed(bounds))
    assert_matches_oracle(rows_of(chosen, bounds, "triton"), oracle, tensors)


def test_the_kernels_do_not_read_later_keys_and_other_documents(poisoned_kernels) -> None:
    tensors, _, _ = make_case(3)
    chosen = torch.tensor([40, 60, 200], dtype=torch.int32)
    clean = outputs_and_gradients(rows_of(chosen, PACKED, "triton"), tensors)
    with torch.no_grad():
        for tensor in tensors[1:]:
            tensor[:, :, 201:] = tensor[:, :, :30] = tensor[:, :, 61:110] = float("nan")
    dirty = outputs_and_gradients(rows_of(chosen, PACKED, "triton"), tensors)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.fixture
def poisoned_kernels(poison_launches: Callable[..., None]) -> None:
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    from sparsetrain_kernels import row_statistics
    from sparsetrain_kernels.dense.triton import launch

    poison_launches(launch, row_statistics)
