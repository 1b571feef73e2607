"""The kernels of SparseK's decoding on a GPU: bf16, real sizes, and a CUDA graph that reads token after token."""

from __future__ import annotations

import pytest
import torch
from decode_slots import assert_same_slots, clone, empty_slots, in_double, normal
from sparsetrain_kernels.score_placement import Moments
from sparsetrain_kernels.sparsek_decode import (
    SparseKSlots,
    buffer_threshold,
    sparsek_decode_attention,
    sparsek_decode_update,
)

from sparsetrain.methods.sparsek.state import Sequence, SparseKState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]
REAL = {"topk": 1024, "window": 1024, "sinks": 4}
SMALL = {"topk": 300, "window": 70, "sinks": 3}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def on_card(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def filled(
    lengths, *, heads=8, selections=8, head_dim=128, dtype=torch.bfloat16, entries=None, shape=SMALL, spread=1.0
):
    """A state on the card whose rows have read texts of these lengths; what they leave empty holds NaN."""
    state = SparseKState(**shape, score_buffer=entries or 4 * shape["topk"], score_heads=selections)
    state.start(on_card(len(lengths), heads, 1, head_dim, dtype=dtype))
    state.slots.keys.fill_(float("nan"))
    state.slots.values.fill_(float("nan"))
    for row, length in enumerate(lengths):
        if length:
            key, value = on_card(2, 1, heads, length, head_dim, dtype=dtype, seed=row)
            scores = spread * on_card(1, selections, length, seed=100 + row)
            position = torch.arange(length, device="cuda").expand_as(scores)
            state.fill([row], Sequence(key, value, scores, position), length, None)
    return state


def token(slots, seed, spread=1.0):
    """Key, value and score of one more token a text."""
    batch, heads, _, head_dim = slots.keys.shape
    key, value = on_card(2, batch, heads, 1, head_dim, dtype=slots.keys.dtype, seed=seed)
    return key, value, spread * on_card(*slots.read.shape, 1, seed=seed + 1)


def assert_steps_equal_the_reference(slots, steps, shape, spread=1.0) -> None:
    """As many tokens for the kernels and for plain PyTorch: every slot equal in every bit, after each of them."""
    plain = clone(slots)
    for step in range(steps):
        new = token(slots, 1000 + 2 * step, spread)
        sparsek_decode_update(*new, slots, **shape, backend="triton")
        sparsek_decode_update(*new, plain, **shape, backend="reference")
        assert_same_slots(slots, plain)


def assert_attends_as_the_reference(slots, query, shape, **options) -> None:
    got = sparsek_decode_attention(query, slots, **shape, **options, backend="triton")
    want = sparsek_decode_attention(query.double(), in_double(slots), **shape, **options, backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[query.dtype], atol=TOLERANCE[query.dtype])


# Narrow scores are all above the threshold, and more than the buffer holds.
@pytest.mark.parametrize("spread", [1.0, 0.003, 30.0])
def test_real_sizes_keep_the_slots_and_thresholds_of_plain_pytorch(spread: float) -> None:
    slots = filled([131, 1500, 2060, 9000], shape=REAL, spread=spread).slots.held
    assert_steps_equal_the_reference(slots, 100, REAL, spread)
    for gate in ("value", "log", "straight"):
        assert_attends_as_the_reference(slots, on_card(4, 32, 1, 128, dtype=torch.bfloat16), REAL, gate=gate)


@pytest.mark.parametrize("selections", [4, 1])
def test_texts_that_start_from_nothing_fill_their_slots(selections: int) -> None:
    shape = {"topk": 37, "window": 20, "sinks": 3}
    slots = empty_slots(2, 4, selections, 90, 96, torch.bfloat16, float("nan"), "cuda", **shape)
    assert_steps_equal_the_reference(slots, 200, shape)
    assert slots.keys.isfinite().all()


@pytest.mark.parametrize(("topk", "entries"), [(1, 2), (1000, 1001), (2048, 8192), (2048, 8193), (9000, 36_000)])
def test_buffers_of_every_length(topk: int, entries: int) -> None:
    shape = {"topk": topk, "window": 5, "sinks": 0}
    slots = filled([topk + 3, 3 * topk + 50], heads=2, selections=2, head_dim=64, entries=entries, shape=shape)
    assert_steps_equal_the_reference(slots.slots.held, 20, shape)


def test_ties_go_to_the_newer_token() -> None:
    slots = filled([5000, 400, 371], shape=SMALL).slots.held
    for tensor in (slots.scores, slots.buffer):
        tensor.copy_((4 * tensor).round() / 4)
    slots.threshold.copy_(buffer_threshold(slots.buffer, SMALL["topk"]))
    plain = clone(slots)
    for step in range(200):
        key, value, scores = token(slots, 2 * step)
        new = key, value, (4 * scores).round() / 4
        sparsek_decode_update(*new, slots, **SMALL, backend="triton")
        sparsek_decode_update(*new, plain, **SMALL, backend="reference")
    assert_same_slots(slots, plain)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_equals_the_reference(dtype, head_dim: int) -> None:
    slots = filled([1, 2, 60, 200, 373, 3000], heads=2, selections=2, head_dim=head_dim, dtype=dtype).slots.held
    assert slots.keys.isnan().any()
    assert_attends_as_the_reference(slots, on_card(6, 8, 1, head_dim, dtype=dtype), SMALL)


@pytest.mark.parametrize("heads", [(8, 8), (28, 4), (64, 1), (24, 2)])
@pytest.mark.parametrize("batch", [1, 70])
def test_attention_equals_the_reference_for_every_group(heads, batch: int) -> None:
    # 70 texts leave no reason to split.
    slots = filled([700] * batch, heads=heads[1], selections=1, head_dim=64).slots.held
    query = on_card(batch, heads[0], 1, 64, dtype=torch.bfloat16)
    assert_attends_as_the_reference(slots, query, SMALL, scale=0.3)


def test_more_than_two_to_the_31_elements() -> None:
    batch = 1030
    slots = empty_slots(batch, 8, 8, 1025, 128, torch.bfloat16, device="cuda", **REAL)
    assert slots.keys.numel() > 2**31
    last = SparseKSlots(*(tensor[-1:].clone() for tensor in slots))
    for step in range(3):
        new = token(slots, step)
        sparsek_decode_update(*new, slots, **REAL)
        sparsek_decode_update(*(tensor[-1:] for tensor in new), last, **REAL, backend="reference")
    assert_same_slots(SparseKSlots(*(tensor[-1:] for tensor in slots)), last)
    query = on_card(batch, 32, 1, 128, dtype=torch.bfloat16)
    got = sparsek_decode_attention(query, slots, **REAL)[-1:]
    want = sparsek_decode_attention(query[-1:].double(), in_double(last), **REAL, backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=1.6e-2, atol=1.6e-2)


def test_one_graph_reads_token_after_token_and_repeats_bit_for_bit() -> None:
    state = filled([1, 360, 900, 5000])
    slots = state.slots
    new, query = token(slots, 0), on_card(4, 32, 1, 128, dtype=torch.bfloat16)
    moments = Moments(*normal(2, 4, 8, dtype=torch.float64, device="cuda"))

    def step() -> torch.Tensor:
        state.step(*new, moments)
        return state.attend(query, gate="value", scale=None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    eager = filled([0, 0, 0, 0])
    for ours, theirs in zip(vars(eager.slots).values(), vars(slots).values(), strict=True):
        ours.copy_(theirs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for number in range(80):
        for tensor, fresh in zip(new, token(slots, 2 * number), strict=True):
            tensor.copy_(fresh)
        moments.total.add_(1)
        graph.replay()
        eager.step(*new, moments)
        assert torch.equal(out, eager.attend(query, gate="value", scale=None))
    for ours, theirs in zip(vars(eager.slots).values(), vars(slots).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert (slots.length == torch.tensor([1, 360, 900, 5000], device="cuda") + 81).all()


def test_nothing_waits_for_the_device() -> None:
    state = filled([360, 900])
    new, query = token(state.slots, 0), on_card(2, 32, 1, 128, dtype=torch.bfloat16)
    moments = state.moments(slice(None))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            state.step(*new, moments)
            state.attend(query, gate="log", scale=None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
