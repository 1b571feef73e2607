"""The keys that chosen rows give the most weight, by sorting in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_oracle import make_inputs
from sparsetrain_kernels import causal_attention_dense, top_k_keys, top_p_keys
from sparsetrain_kernels.backend import INTERPRETING
from torch import Tensor

PACKED = (0, 1, 12, 30, 30, 110, 200)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


class Rows:
    """Chosen rows of a random sequence, and the weights of all their keys in fp64."""

    def __init__(self, bounds: tuple[int, ...] | None = None, rows: int = 40, **options: Any) -> None:
        heads = options.pop("heads", (4, 2))
        query, self.key, _ = (t.detach() for t in make_inputs(*heads, 200, seed=5, **options))
        self.query = query * 3
        self.cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        every = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:rows]
        self.positions = every.sort()[0].int()
        self.query = self.query[:, :, self.positions]
        self.bounds = bounds or (0, 200)
        _, self.lse = causal_attention_dense(
            self.query, self.key, self.key, query_positions=self.positions, cu_seqlens=self.cu_seqlens
        )

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return (self.query, self.key, self.lse), {"query_positions": self.positions, "cu_seqlens": self.cu_seqlens}

    def start(self, row: int) -> int:
        return max(start for start in self.bounds if start <= int(self.positions[row]))

    def weights(self, batch: int, head: int, row: int) -> Tensor:
        """``[group, keys]`` of the document up to the row."""
        group = self.query.shape[1] // self.key.shape[1]
        keys = self.key[batch, head, self.start(row) : int(self.positions[row]) + 1].double()
        queries = self.query[batch, head * group : (head + 1) * group, row].double()
        return (queries @ keys.T * queries.shape[1] ** -0.5).softmax(-1)

    def each(self) -> list[tuple[int, int, int]]:
        return [
            (b, h, r)
            for b in range(self.key.shape[0])
            for h in range(self.key.shape[1])
            for r in range(len(self.positions))
        ]


def poison(poison_launches: Callable[..., None], backend: str) -> None:
    if backend == "triton":
        if not INTERPRETING:
            pytest.skip("runs in Triton's interpreter, on machines without a GPU")
        from sparsetrain_kernels.key_choice.triton import launch

        poison_launches(launch)


CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "packed": {"bounds": PACKED},
    "batch": {"batch": 2, "rows": 9},
    "groups": {"heads": (7, 1), "rows": 12, "head_dim": 24},
}


@pytest.mark.parametrize(
    ("name", "width", "sinks", "window", "backend"),
    [(name, *always, "reference") for name in CASES for always in ((7, 0, 0), (1, 2, 0), (3, 2, 5))]
    + [("packed", 3, 2, 5, "triton"), ("batch", 7, 0, 0, "triton"), ("groups", 1, 2, 0, "triton")],
)
def test_the_heaviest_keys_are_listed(
    name: str, width: int, sinks: int, window: int, backend: str, poison_launches
) -> None:
    poison(poison_launches, backend)
    rows = Rows(**CASES[name])
    tensors, options = rows.arguments()
    found = top_k_keys(*tensors, 10, width=width, sinks=sinks, window=window, backend=backend, **options)
    for b, h, r in rows.each():
        weights = rows.weights(b, h, r).amax(0)
        pad = width // 2
        pooled = torch.nn.functional.max_pool1d(weights[None], width, 1, pad)[0] if pad else weights
        length = len(weights)
        candidates = torch.arange(min(sinks, length), max(length - window, min(sinks, length)))
        listed = found.lists[b, h, r, : found.counts[b, h, r]].long()
        assert len(listed) == min(10, len(candidates))
        assert set(listed.tolist()) <= set(candidates.tolist())
        assert listed.tolist() == sorted(set(listed.tolist()))
        if len(candidates) > 10:
            # Up to what fp16 tells apart of their logarithms.
            least = pooled[candidates].sort(descending=True)[0][9]
            assert (pooled[listed].log() >= least.log() - 0.01).all()
            above = candidates[pooled[candidates].log() > least.log() + 0.01]
            assert set(above.tolist()) <= set(listed.tolist())


@BACKENDS
def test_of_equal_keys_the_newest_are_listed(backend: str, poison_launches) -> None:
    poison(poison_launches, backend)
    query, key = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 50, 16)
    positions = torch.tensor([5, 40], dtype=torch.int32)
    lse = (positions + 1.0).log().expand(1, 4, 2)
    found = top_k_keys(query, key, lse, 8, query_positions=positions, sinks=1, backend=backend)
    assert found.counts[0].tolist() == [[5, 8]] * 2
    assert found.lists[0, 1, 0, :5].tolist() == [1, 2, 3, 4, 5]
    assert found.lists[0, 1, 1].tolist() == list(range(33, 41))
    assert found.dropped[0].tolist() == [[0, 32]] * 2


@BACKENDS
def test_of_equal_keys_that_do_not_all_fit_a_share_lists_none(backend: str, poison_launches) -> None:
    poison(poison_launches, backend)
    query, key = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 50, 16)
    query[..., 0] = 1.0
    # Three keys weigh more than the others, which are equal.
    key[:, :, [3, 20, 30], 0] = 8.0
    positions = torch.tensor([5, 40], dtype=torch.int32)
    logits = (query @ key.repeat_interleave(2, 1).mT)[0, 0, 0] / 4
    lse = torch.stack([logits[: place + 1].logsumexp(0) for place in positions.tolist()]).expand(1, 4, 2)
    found = top_p_keys(query, key, lse, 1.0, query_positions=positions, capacity=8, backend=backend)
    assert found.counts[0].tolist() == [[6, 3]] * 2
    assert found.lists[0, 1, 1, :3].tolist() == [3, 20, 30]
    assert found.dropped[0].tolist() == [[0, 38]] * 2


@pytest.mark.parametrize(
    ("group", "backend"),
    [("union", "reference"), ("max", "reference"), ("mean", "reference"), ("union", "triton"), ("mean", "triton")],
)
def test_the_fewest_keys_that_hold_a_share_are_listed(group: str, backend: str, poison_launches) -> None:
    poison(poison_launches, backend)
    rows = Rows(bounds=PACKED, rows=10)
    tensors, options = rows.arguments()
    found = top_p_keys(*tensors, 0.8, capacity=200, group=group, backend=backend, **options)
    for b, h, r in rows.each():
        weights = rows.weights(b, h, r)
        listed = found.lists[b, h, r, : found.counts[b, h, r]].long()
        if group != "union":
            weights = weights.amax(0, keepdim=True) if group == "max" else weights.mean(0, keepdim=True)
            weights = weights / weights.sum()
        wanted: set[int] = set()
        for row in weights:
            order = row.argsort(descending=True)
            needed = int((row[order].cumsum(0) < 0.8 - 2e-3).sum()) + 1
            wanted |= set(order[:needed].tolist())
            assert row[listed].sum() >= 0.8 - 2e-3
        assert wanted <= set(listed.tolist())
        assert len(listed) <= len(wanted) + len(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_choose_what_plain_pytorch_does(
    dtype: torch.dtype, poison_launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(poison_launches, "triton")
    from sparsetrain_kernels.key_choice.triton import launch

    monkeypatch.setattr(launch, "PART_ELEMENTS", 7 * launch.ALIGNED)
    rows = Rows(bounds=PACKED, rows=12, dtype=dtype)
    tensors, options = rows.arguments()
    ours, plain = (top_k_keys(*tensors, 10, backend=backend, **options) for backend in ("triton", "reference"))
    assert torch.equal(ours.counts, plain.counts)
    same = sum(
        torch.equal(ours.lists[place][:count], plain.lists[place][:count])
        for place, count in ((place, int(plain.counts[place])) for place in rows.each())
    )
    # Products are rounded in another order, which moves a weight past another now and then.
    assert same >= 0.9 * len(rows.each())


def test_a_packed_document_chooses_as_one_alone() -> None:
    rows = Rows(bounds=PACKED)
    tensors, options = rows.arguments()
    packed = top_k_keys(*tensors, 10, **options)
    own = ((rows.positions >= 30) & (rows.positions < 110)).nonzero().flatten()
    part = slice(int(own[0]), int(own[-1]) + 1)
    alone = top_k_keys(
        tensors[0][:, :, part],
        tensors[1][:, :, 30:110],
        tensors[2][:, :, part],
        10,
        query_positions=rows.positions[part] - 30,
    )
    counts = alone.counts
    assert torch.equal(counts, packed.counts[:, :, part])
    inside = torch.arange(10) < counts[..., None]
    assert torch.equal(alone.lists[inside], packed.lists[:, :, part][inside])


def test_no_square_tensor_is_built(monkeypatch: pytest.MonkeyPatch, largest_tensor) -> None:
    from sparsetrain_kernels.key_choice import reference

    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2**15)
    query, key, _ = make_inputs(2, 1, 512, 4096, head_dim=8)
    positions = torch.arange(7, 4096, 8, dtype=torch.int32)
    lse = torch.zeros(1, 2, 512)
    assert largest_tensor(lambda: top_k_keys(query, key, lse, 16, query_positions=positions)) < 512 * 4096 / 8


def test_it_is_well_made_and_has_no_gradient() -> None:
    rows = Rows(bounds=PACKED, rows=8)
    tensors, options = rows.arguments()
    arguments = (*tensors[:1], tensors[1], tensors[2], rows.positions, rows.cu_seqlens, 0.25, 10, 0.0, "max", 7, 1, 2)
    torch.library.opcheck(torch.ops.sparsetrain.key_choice.default, (*arguments, "reference"), test_utils="test_schema")
    found = top_k_keys(tensors[0].requires_grad_(), *tensors[1:], 10, **options)
    assert not any(tensor.requires_grad for tensor in found)


QUERY, KEY, LSE = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 10, 8), torch.zeros(1, 4, 3)
CHOSEN = torch.tensor([0, 4, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("choose", "wrong", "named"),
    [
        (top_k_keys, {"k": 0}, "k=0 must be at least 1"),
        (top_k_keys, {"k": 4, "width": 4}, "width=4 must be an odd number"),
        (top_k_keys, {"k": 4, "lse": LSE[:, :2]}, r"lse has shape \(1, 2, 3\), expected one number a row"),
        (top_k_keys, {"k": 4, "lse": CHOSEN.expand(1, 4, 3)}, "lse is torch.int32"),
        (top_k_keys, {"k": 4, "sinks": -1}, "sinks=-1 must be at least 0"),
        (top_k_keys, {"k": 4, "window": -1}, "window=-1 must be at least 0"),
        (top_k_keys, {"k": 4, "query_positions": CHOSEN.flip(0)}, "must ascend within 0 to 9"),
        (top_k_keys, {"k": 4, "backend": "gluon"}, "there is no Hopper version"),
        (top_p_keys, {"p": 0.0, "capacity": 4}, "p=0.0 is no share"),
        (top_p_keys, {"p": 0.5, "capacity": 0}, "capacity=0 must be at least 1"),
        (top_p_keys, {"p": 0.5, "capacity": 4, "group": "sum"}, "group='sum' does not exist"),
    ],
)
def test_wrong_arguments_are_named(choose: Callable[..., Any], wrong: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        choose(**{"query": QUERY, "key": KEY, "lse": LSE, "query_positions": CHOSEN, **wrong})
