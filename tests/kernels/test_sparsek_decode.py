"""A step of SparseK's generation: the Triton kernels, in Triton's interpreter, do what plain PyTorch does.

That plain PyTorch selects as the definition says, over thousands of steps, is what ``tests/methods`` tests.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from decode_slots import SHAPE, assert_same_slots, clone, empty_slots, in_double, normal, ragged, read
from sparsek_oracle import threshold
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.sparsek_decode import (
    EMPTY,
    SparseKSlots,
    buffer_threshold,
    sparsek_decode_attention,
    sparsek_decode_update,
)

GATES = ("value", "log", "straight")
NAN = float("nan")

if INTERPRETING:
    import triton
    import triton.language as tl
    from sparsetrain_kernels.sparsek_decode.triton.attention import holds_token

    @triton.jit
    def held_kernel(out_ptr, read, TOPK: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr):
        slot = tl.arange(0, 32)
        tl.store(out_ptr + slot, holds_token(slot, read, TOPK, WINDOW, SINKS).to(tl.int32))


interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter, on machines without a GPU")


SHAPES = [
    {},
    {"topk": 13, "window": 3, "sinks": 1},
    {"topk": 1, "window": 1, "sinks": 0},
    {"topk": 4, "window": 16, "sinks": 5},
]


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_steps_lead_to_the_slots_of_plain_pytorch(shape) -> None:
    # A head of ordinary scores, one of ties, and one of narrow ones, all above the threshold: they overflow the buffer.
    scores = normal(1, 3, 45)
    scores[:, 1] = (2.0 * scores[:, 1]).round()
    scores[:, 2] *= 0.01
    ours, plain = empty_slots(heads=3, selections=3, **shape), empty_slots(heads=3, selections=3, **shape)
    for n in range(45):
        read(ours, scores[..., n : n + 1], "triton", **shape)
        read(plain, scores[..., n : n + 1], "reference", **shape)
        assert_same_slots(ours, plain)


@interpreted
@pytest.mark.parametrize("heads", [(3, 3), (3, 1), (1, 1)], ids=str)
def test_texts_of_different_lengths_step_together(heads) -> None:
    make = {"heads": heads[0], "selections": heads[1], "head_dim": 5}
    ours = ragged([1, 2, 8, 13, 14, 29], **make, fill=NAN)
    plain = clone(ours)
    scores = normal(6, heads[1], 4, seed=7)
    read(ours, scores, "triton")
    read(plain, scores, "reference")
    assert_same_slots(ours, plain)
    held = (ours.positions != EMPTY).expand(-1, heads[0], -1)
    assert ours.keys[held].isfinite().all()
    assert ours.values[held].isfinite().all()


@interpreted
@pytest.mark.parametrize("layout", ["tokens first", "expanded", "scattered"])
def test_the_layout_of_the_new_token_does_not_matter(layout: str) -> None:
    ours = ragged([20, 9])
    plain = clone(ours)
    key, value, scores = normal(2, 1, 2, 8).transpose(1, 2), normal(2, 2, 1, 8), normal(2, 2, 1)
    if layout == "expanded":
        scores = scores[:1].expand(2, -1, -1)
    elif layout == "scattered":
        key, value = (tensor.mT.contiguous().mT.flip(3).mT.contiguous().mT for tensor in (key, value))
        scores = torch.stack([scores, scores], 1)[:, 0]
    sparsek_decode_update(key, value, scores, ours, **SHAPE, backend="triton")
    sparsek_decode_update(key, value, scores, plain, **SHAPE, backend="reference")
    assert_same_slots(ours, plain)


@interpreted
def test_long_buffers_and_many_places_are_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain_kernels.sparsek_decode.triton import launch

    monkeypatch.setattr(launch, "HELD", 4)
    monkeypatch.setattr(launch, "BLOCK", 8)
    shape = {"topk": 18, "window": 2, "sinks": 1}
    scores = (2 * normal(1, 2, 38)).round() / 4
    start = read(empty_slots(entries=27, **shape), scores[..., :26], "reference", **shape)
    ours, plain = clone(start), clone(start)
    # The buffer fills up, and is full.
    for n in range(26, 38):
        read(ours, scores[..., n : n + 1], "triton", **shape)
        read(plain, scores[..., n : n + 1], "reference", **shape)
        assert_same_slots(ours, plain)


def after_entering(buffer, before, topk, score=-torch.inf):
    """The threshold after ``score`` has competed for a place in ``buffer [C]``, searched for from ``before`` on."""
    slots = empty_slots(1, 1, 1, len(buffer), 1, topk=topk, window=1, sinks=0)
    slots.read.fill_(5 * topk)
    slots.positions.copy_(torch.arange(topk + 1))
    slots.scores.fill_(score)
    slots.buffer.copy_(buffer)
    slots.threshold.fill_(before)
    token = torch.zeros(1, 1, 1, 1)
    sparsek_decode_update(token, token, token[..., 0], slots, topk=topk, window=1, sinks=0, backend="triton")
    assert torch.equal(slots.buffer[0, 0].sort().values, torch.maximum(buffer, one_entry(buffer, score)).sort().values)
    return slots.threshold[0, 0]


def one_entry(buffer, score):
    """``score`` at the least entry, and -inf elsewhere."""
    return torch.full_like(buffer, -torch.inf).index_fill(0, buffer.argmin(), score)


BUFFERS = {
    "normal": normal(40),
    "ties": (2 * normal(40)).round(),
    "equal": torch.full((40,), 0.3),
    "leading by more than 1": torch.cat([normal(7) + 20, normal(33)]),
    "leading by exactly 1": torch.cat([torch.full((7,), 4.0), torch.full((33,), 3.0)]),
    "on the kinks": torch.arange(40.0) % 4,
    "far from zero": normal(40) + 1e4,
    "of every size": (5 * normal(40)).exp(),
    "room for more": torch.cat([normal(20), torch.full((20,), -torch.inf)]),
}


@interpreted
@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("topk", [1, 7, 19])
def test_the_threshold_is_that_of_sorting_wherever_the_search_starts(name: str, topk: int) -> None:
    buffer = BUFFERS[name]
    finite = buffer[buffer > -torch.inf].double().numpy()
    want = torch.tensor(threshold(finite, topk), dtype=torch.float32)
    found = {float(after_entering(buffer, before, topk)) for before in (-torch.inf, float(want), -3.0, 2.5, 1e6)}
    assert len(found) == 1
    torch.testing.assert_close(torch.tensor(found.pop()), want, rtol=1.2e-7, atol=1e-12)


@interpreted
def test_the_threshold_sees_the_score_that_enters() -> None:
    buffer = normal(40)
    for score in (3.0, float(buffer.min()), -9.0):
        entered = torch.maximum(buffer, one_entry(buffer, score))
        torch.testing.assert_close(after_entering(buffer, -1.0, 7, score), buffer_threshold(entered, 7))


@interpreted
def test_without_competition_there_is_no_threshold_and_infinity_is_no_score() -> None:
    buffer = normal(40).sort(descending=True).values
    few = torch.where(torch.arange(40) < 7, buffer, -torch.inf)
    assert after_entering(few, -torch.inf, 7) == -torch.inf
    assert after_entering(few, -torch.inf, 7, score=0.5) == buffer_threshold(
        torch.cat([few[:7], normal(1) * 0 + 0.5]), 7
    )
    assert after_entering(buffer.index_fill(0, torch.tensor(3), torch.inf), 0.0, 7).isnan()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do not write of their outputs stays NaN."""
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    from sparsetrain_kernels.sparsek_decode.triton import launch

    def empty(*args, **kwargs):
        return torch.full(*args, NAN, **kwargs)

    monkeypatch.setattr(launch, "torch", SimpleNamespace(empty=empty, float32=torch.float32, uint8=torch.uint8))


LENGTHS = [1, 3, 8, 11, 14, 40]
"""Of sinks, window and places, in this order: one, all of the sinks, all of the window, some places, all, and later."""


def assert_attends_as_the_reference(slots, query, tolerance=1e-5, **options) -> None:
    got = sparsek_decode_attention(query, slots, **{**SHAPE, **options}, backend="triton")
    want = sparsek_decode_attention(query.double(), in_double(slots), **{**SHAPE, **options}, backend="reference")
    assert got.dtype == query.dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("heads", [(2, 2), (2, 1), (3, 3)], ids=str)
def test_attention_equals_the_reference(poisoned, gate: str, heads) -> None:
    slots = ragged(LENGTHS, heads=heads[0], selections=heads[1], fill=NAN)
    assert slots.keys.isnan().any()
    assert_attends_as_the_reference(slots, normal(6, 2 * heads[0], 1, 8), gate=gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1)], ids=str)
def test_slots_that_are_left_out_are_as_if_empty(poisoned, gate: str, heads) -> None:
    slots = ragged(LENGTHS, heads=heads[0], selections=heads[1])
    held = (slots.positions != EMPTY).expand(-1, heads[0], -1)
    kept = held & (torch.rand(held.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    kept |= held & (slots.positions == slots.read[..., None] - 1)
    query = normal(6, 2 * heads[0], 1, 8)
    assert_attends_as_the_reference(slots, query, gate=gate, kept=kept)
    spoiled = slots._replace(
        keys=slots.keys.masked_fill(~kept[..., None], NAN), values=slots.values.masked_fill(~kept[..., None], NAN)
    )
    for backend in ("triton", "reference"):
        got, want = (
            sparsek_decode_attention(query, each, **SHAPE, gate=gate, kept=kept, backend=backend)
            for each in (spoiled, slots)
        )
        assert torch.equal(got, want)
    every = sparsek_decode_attention(query, slots, **SHAPE, gate=gate, kept=held.contiguous(), backend="triton")
    assert torch.equal(every, sparsek_decode_attention(query, slots, **SHAPE, gate=gate, backend="triton"))


@pytest.mark.parametrize("group", [1, 7, 20])
def test_every_group_of_heads_reads_its_own(poisoned, group: int) -> None:
    slots = ragged([30, 6], fill=NAN)
    assert_attends_as_the_reference(slots, normal(2, 2 * group, 1, 8), scale=0.7)


@pytest.mark.parametrize("head_dim", [1, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_head_dim_reads_its_own(poisoned, head_dim: int, dtype) -> None:
    slots = ragged([30, 6], head_dim=head_dim, dtype=dtype, fill=NAN)
    query = normal(2, 4, 1, head_dim, dtype=dtype)
    assert_attends_as_the_reference(slots, query, 1e-5 if dtype == torch.float32 else 2e-3)


@cache
def long_slots(topk: int, window: int, sinks: int) -> SparseKSlots:
    """Some shares are empty; in the last text scores rise so that one holds keys and gives them no weight."""
    rising = torch.arange(300.0).expand(1, 2, -1) * 2
    scores = torch.cat([normal(2, 2, 300), rising])
    shape = {"topk": topk, "window": window, "sinks": sinks}
    slots = ragged([40, 200, 300], scores=scores, entries=120, fill=NAN, **shape)
    slots.scores[2, :, sinks : sinks + 40] = -50.0
    return slots


@pytest.mark.parametrize("splits", [1, 2, 9])
@pytest.mark.parametrize("gate", ["value", "log"])
@pytest.mark.parametrize("shape", [{"topk": 90, "window": 50, "sinks": 1}, {"topk": 50, "window": 90, "sinks": 7}])
def test_the_number_of_shares_changes_nothing(poisoned, monkeypatch, splits: int, gate: str, shape) -> None:
    from sparsetrain_kernels.block_decode.triton.configs import Config
    from sparsetrain_kernels.sparsek_decode.triton import launch

    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: splits)
    monkeypatch.setattr(launch, "choose_config", lambda *arguments: Config(16, 16, 1))
    assert_attends_as_the_reference(long_slots(**shape), normal(3, 4, 1, 8), gate=gate, **shape)


@interpreted
def test_a_threshold_that_is_not_a_number_shows() -> None:
    slots = ragged([30])
    slots.threshold.fill_(NAN)
    for backend in ("triton", "reference"):
        assert sparsek_decode_attention(normal(1, 2, 1, 8), slots, **SHAPE, backend=backend).isnan().all()


@interpreted
def test_which_slots_are_empty_follows_from_the_tokens_read() -> None:
    for shape in SHAPES:
        shape = {**SHAPE, **shape}
        topk, window, sinks = shape.values()
        slots = empty_slots(heads=1, selections=1, head_dim=1, **shape)
        for length in range(1, 50):
            read(slots, normal(1, 1, 1, seed=length), "reference", **shape)
            held = torch.zeros(32, dtype=torch.int32)
            held_kernel[(1,)](held, slots.read[0, 0].item(), topk, window, sinks)
            assert torch.equal(held[: topk + window + sinks].bool(), slots.positions[0, 0] != EMPTY)
            assert not held[topk + window + sinks :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_operations_are_well_made(dtype) -> None:
    slots = ragged([30, 5], dtype=dtype)
    token, scores = normal(2, 2, 1, 8, dtype=dtype), normal(2, 2, 1, dtype=dtype)
    update = (token, token, scores, *slots, *SHAPE.values(), "reference")
    torch.library.opcheck(torch.ops.sparsetrain.sparsek_decode_update.default, update)
    for kept in (None, torch.ones(2, 2, slots.keys.shape[2], dtype=torch.bool)):
        attend = (normal(2, 4, 1, 8, dtype=dtype), *slots, 6, 3, "value", 0.3, kept, "reference")
        torch.library.opcheck(torch.ops.sparsetrain.sparsek_decode_attention.default, attend)


SLOTS = ragged([20])
TOKEN, SCORES, QUERY = normal(1, 2, 1, 8), normal(1, 2, 1), normal(1, 4, 1, 8)
UPDATE = {"key": TOKEN, "value": TOKEN, "scores": SCORES, "slots": SLOTS, **SHAPE}
ATTEND = {"query": QUERY, "slots": SLOTS, **SHAPE}


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"key": TOKEN[:, :1]}, ValueError, r"key has shape \(1, 1, 1, 8\), expected \(1, 2, 1, 8\)"),
        ({"value": TOKEN.double()}, TypeError, "value has dtype torch.float64, but the slots hold torch.float32"),
        ({"scores": SCORES[:, :1]}, ValueError, r"scores has shape \(1, 1, 1\), expected \(1, 2, 1\)"),
        ({"scores": SCORES.half()}, TypeError, "scores has dtype torch.float16"),
        ({"key": TOKEN.clone().requires_grad_()}, ValueError, "key requires a gradient"),
        ({"topk": 7}, ValueError, r"keys has 14 slots, expected 3 sinks \+ 7 selected \+ 5 of the window"),
        ({"slots": SLOTS._replace(keys=SLOTS.keys[0])}, ValueError, "keys has shape"),
        ({"slots": SLOTS._replace(values=SLOTS.values.half())}, TypeError, "values is torch.float16"),
        ({"slots": SLOTS._replace(values=SLOTS.values[..., :4])}, ValueError, "values has shape"),
        ({"slots": SLOTS._replace(positions=SLOTS.positions.int())}, TypeError, "positions is torch.int32"),
        ({"slots": SLOTS._replace(positions=SLOTS.positions.repeat(1, 2, 1))}, ValueError, "positions has 4 heads"),
        ({"slots": SLOTS._replace(buffer=SLOTS.buffer[..., :6])}, ValueError, "buffer has 6 entries"),
        ({"slots": SLOTS._replace(read=SLOTS.read[:, :1])}, ValueError, r"read has shape \(1, 1\), expected \(1, 2\)"),
        ({"slots": SLOTS._replace(keys=SLOTS.keys.mT.contiguous().mT)}, ValueError, "keys has strides"),
        ({"backend": "gluon"}, ValueError, "backend='gluon' cannot run this: decoding has plain Triton kernels only"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_by_name(changed, error, named: str) -> None:
    with pytest.raises(error, match=named):
        sparsek_decode_update(**{**UPDATE, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"query": QUERY[:, :3]}, ValueError, "query has 3 heads, which is no multiple of the 2 heads"),
        ({"query": QUERY[0]}, ValueError, r"query has shape \(4, 1, 8\)"),
        ({"query": QUERY[..., :4]}, ValueError, "query has shape"),
        ({"query": QUERY.clone().requires_grad_()}, ValueError, "query requires a gradient"),
        ({"gate": "soft"}, ValueError, "gate='soft' does not exist; choose one of value, log, straight"),
        ({"scale": 0.0}, ValueError, "scale=0.0 must be positive"),
        ({"window": 4}, ValueError, "keys has 14 slots"),
        ({"kept": SLOTS.positions}, TypeError, "kept is torch.int64"),
        ({"kept": SLOTS.positions[..., :4] > 0}, ValueError, "kept has shape"),
    ],
)
def test_queries_that_do_not_fit_are_refused_by_name(changed, error, named: str) -> None:
    with pytest.raises(error, match=named):
        sparsek_decode_attention(**{**ATTEND, **changed})


def test_the_kernels_say_what_they_cannot_run() -> None:
    with pytest.raises(
        ValueError, match=r"cannot run this: query is torch\.float16, but the slots hold torch\.float32"
    ):
        sparsek_decode_attention(**{**ATTEND, "query": QUERY.half()}, backend="triton")
    slots, token = ragged([20], dtype=torch.float64), TOKEN.double()
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        sparsek_decode_update(token, token, SCORES.double(), slots, **SHAPE, backend="triton")
    slots, token = empty_slots(head_dim=512), normal(1, 2, 1, 512)
    with pytest.raises(ValueError, match="head_dim of up to 256, not 512"):
        sparsek_decode_update(token, token, SCORES, slots, **SHAPE, backend="triton")
