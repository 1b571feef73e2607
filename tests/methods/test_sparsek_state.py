"""The slots of generation hold exactly what the selection of the whole text says, and never more."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sparsek_oracle import threshold
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.score_placement import Moments
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.methods.sparsek import state as sparsek_state
from sparsetrain.methods.sparsek.state import EMPTY, Sequence, SparseKState

SHAPE = {"topk": 6, "window": 5, "sinks": 3}


def state(score_buffer=4000, score_heads=2, **shape):
    return SparseKState(score_buffer=score_buffer, score_heads=score_heads, **{**SHAPE, **shape})


def tokens(scores, heads=2, start=0):
    """Keys and values that tell their position: ``[B, H, N, 1]``, and ``scores [B, Hs, N]``."""
    batch, _, length = scores.shape
    position = torch.arange(start, start + length, dtype=torch.float32)
    key = position[None, None, :, None].expand(batch, heads, length, 1).clone()
    return key, -key, scores


def feed(slots, scores, chunks):
    """Read ``scores`` in chunks: single tokens by ``step``, others by ``fill``."""
    read = slots.lengths[0] if slots.lengths else 0
    for piece in scores.split(chunks, dim=2):
        key, value, piece = tokens(piece, start=read)
        slots.start(key)
        if piece.shape[2] == 1 and slots.started:
            slots.step(key, value, piece, None)
        else:
            position = torch.arange(read, read + piece.shape[2]).expand_as(piece)
            sequence = slots.sequence(slice(None), read, Sequence(key, value, piece, position))
            slots.fill(slice(None), sequence, read + piece.shape[2], None)
        read += piece.shape[2]


def kept(scores, row, topk=6, window=5, sinks=3):
    """Positions that the token at ``row`` reads, from the definition: newer ones win ties."""
    candidates = np.arange(sinks, max(row - window + 1, sinks))
    best = sorted(candidates, key=lambda j: (scores[j], j), reverse=True)[:topk]
    return set(range(min(sinks, row + 1))) | set(best) | set(range(max(0, row - window + 1), row + 1))


def held(slots, batch, head):
    positions = slots.slots.positions[batch, head]
    return positions[positions != EMPTY].tolist()


def test_over_thousands_of_steps_slots_and_thresholds_are_those_of_the_whole_text():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(1, 2, 2200))
    scores = torch.from_numpy(noise + np.linspace(0, 4, 2200) * [[[0.0], [1.0]]]).float()
    slots = state(score_buffer=2200)
    feed(slots, scores[..., :1], [1])
    for row in range(1, 2200):
        feed(slots, scores[..., row : row + 1], [1])
        if row % 7 and row > 40:
            continue
        for head in range(2):
            past = scores[0, head].double().numpy()
            positions = held(slots, 0, head)
            assert len(positions) == len(set(positions))
            assert set(positions) == kept(past, row)
            expected = threshold(past[3 : max(row - 5 + 1, 3)], 6)
            assert float(slots.threshold()[0, head]) == pytest.approx(expected, abs=1e-6)


def test_keys_and_values_travel_with_their_positions():
    slots = state()
    feed(slots, torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(0)), [100] + [1] * 60 + [140])
    valid = slots.slots.positions != EMPTY
    for tensor, sign in ((slots.slots.keys, 1), (slots.slots.values, -1)):
        assert torch.equal(tensor[..., 0][valid], sign * slots.slots.positions[valid].float())


@pytest.mark.parametrize(
    "chunks",
    [[60], [1] * 60, [2] * 30, [3, 57], [1, 2, 57], [9, 1, 50], [40, 20], [4, 4, 4, 4, 4, 1, 1, 20, 18]],
    ids=str,
)
def test_reading_in_chunks_leads_to_the_same_slots(chunks):
    scores = torch.randn(1, 2, 60, generator=torch.Generator().manual_seed(3))
    slots = state()
    feed(slots, scores, chunks)
    for head in range(2):
        past = scores[0, head].double().numpy()
        assert set(held(slots, 0, head)) == kept(past, 59)
        assert float(slots.threshold()[0, head]) == pytest.approx(threshold(past[3:55], 6), abs=1e-6)


@pytest.mark.parametrize("chunks", [[1] * 80, [30, 50], [20] * 4], ids=str)
def test_of_equal_scores_the_newer_token_stays(chunks):
    scores = torch.randint(0, 3, (1, 2, 80), generator=torch.Generator().manual_seed(1)).float()
    slots = state()
    feed(slots, scores, chunks)
    for head in range(2):
        assert set(held(slots, 0, head)) == kept(scores[0, head].numpy(), 79)


@pytest.mark.parametrize(
    "shape", [{"sinks": 0}, {"window": 1}, {"topk": 1}, {"sinks": 0, "window": 1, "topk": 1}], ids=str
)
def test_small_shapes(shape):
    scores = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(2))
    for chunks in ([1] * 50, [20, 30]):
        slots = state(**shape)
        feed(slots, scores, chunks)
        for head in range(2):
            assert set(held(slots, 0, head)) == kept(scores[0, head].numpy(), 49, **{**SHAPE, **shape})


def test_rows_of_different_lengths_step_together():
    scores = torch.randn(3, 2, 80, generator=torch.Generator().manual_seed(4))
    lengths, slots = [2, 30, 11], state()
    key, value, _ = tokens(scores)
    slots.start(key)
    for row, length in enumerate(lengths):
        position = torch.arange(length).expand(1, 2, length)
        new = Sequence(
            key[row : row + 1, :, :length],
            value[row : row + 1, :, :length],
            scores[row : row + 1, :, :length],
            position,
        )
        slots.fill([row], slots.sequence([row], 0, new), length, None)
    for step in range(50):
        at = torch.tensor(lengths) + step
        rows = torch.arange(3)
        slots.step(key[rows, :, at][:, :, None], value[rows, :, at][:, :, None], scores[rows, :, at][..., None], None)
    for row, length in enumerate(lengths):
        assert slots.lengths[row] == length + 50
        for head in range(2):
            assert set(held(slots, row, head)) == kept(scores[row, head].numpy(), length + 49)


def test_the_tensors_never_grow():
    slots = state(score_buffer=30)
    feed(slots, torch.randn(1, 2, 50), [50])
    sizes = [tensor.shape for tensor in vars(slots.slots).values()]
    feed(slots, torch.randn(1, 2, 3000), [1] * 1500 + [1500])
    assert [tensor.shape for tensor in vars(slots.slots).values()] == sizes
    assert slots.slots.keys.shape[2] == 6 + 5 + 3


@pytest.mark.parametrize("chunks", [[1] * 400, [200] + [1] * 200], ids=["steps", "mixed"])
def test_a_full_score_buffer_lowers_the_threshold_by_less_than_its_share(chunks):
    topk, buffer = 6, 18
    narrow = 0.01 * torch.randn(1, 2, 400, generator=torch.Generator().manual_seed(5))  # all of it is support
    slots, whole = state(score_buffer=buffer), state()
    feed(slots, narrow, chunks)
    feed(whole, narrow, chunks)
    bias = whole.threshold() - slots.threshold()
    assert bool((bias > 0.1 * topk / buffer).all()), "the buffer is meant to overflow here"
    assert bool((bias < topk / buffer).all())
    for head in range(2):
        assert set(held(slots, 0, head)) == kept(narrow[0, head].numpy(), 399)


def test_after_an_overflow_the_threshold_becomes_exact_again():
    narrow = 0.01 * torch.randn(1, 2, 300, generator=torch.Generator().manual_seed(5))
    wide = torch.randn(1, 2, 300, generator=torch.Generator().manual_seed(6)) + 3.0
    slots, whole = state(score_buffer=60), state()
    for slot in (slots, whole):
        feed(slot, torch.cat([narrow, wide], 2), [1] * 600)
    torch.testing.assert_close(slots.threshold(), whole.threshold(), rtol=0, atol=1e-6)


def test_rows_can_be_reordered_and_repeated():
    scores = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(7))
    slots, alone = state(), state()
    feed(slots, scores, [40])
    slots.select_rows(torch.tensor([1, 0, 1]))
    feed(alone, scores[1:], [40])
    assert slots.lengths == [40, 40, 40]
    for name, tensor in vars(alone.slots).items():
        assert torch.equal(getattr(slots.slots, name)[2:], tensor)
        assert torch.equal(getattr(slots.slots, name)[:1], tensor)


def test_reset_forgets_everything():
    slots = state()
    feed(slots, torch.randn(1, 2, 40), [40])
    slots.reset()
    assert not slots.started
    feed(slots, torch.randn(3, 2, 4), [4])
    assert slots.lengths == [4, 4, 4]


@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter, on machines without a GPU")
def test_by_the_kernels_too_slots_and_thresholds_are_those_of_the_whole_text(monkeypatch):
    for name in ("sparsek_decode_update", "sparsek_decode_attention"):
        monkeypatch.setattr(sparsek_state, name, partial(getattr(sparsek_state, name), backend="triton"))
    scores = torch.randn(1, 2, 60, generator=torch.Generator().manual_seed(8))
    slots = state()
    for chunks in ([20], [1] * 20, [15], [1] * 5):
        read = slots.lengths[0] if slots.lengths else 0
        feed(slots, scores[..., read : read + sum(chunks)], chunks)
    query = torch.ones(1, 2, 1, 1)
    out = slots.attend(query, gate="value", scale=0.01)
    for head in range(2):
        past = scores[0, head].double().numpy()
        expected = threshold(past[3:55], 6)
        assert set(held(slots, 0, head)) == kept(past, 59)
        assert float(slots.threshold()[0, head]) == pytest.approx(expected, abs=1e-6)
        read = np.array(sorted(kept(past, 59)))
        weights = np.exp(0.01 * read) / np.exp(0.01 * read).sum()
        gates = np.where((read >= 3) & (read < 55), np.clip(past[read] - expected, 0, 1), 1.0)
        assert float(out[0, head]) == pytest.approx(-(weights * gates * read).sum(), rel=1e-5)


class _Operations(TorchDispatchMode):
    """Remembers the names of the operations that compute something, on a GPU by launching it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() != "aten::promote_types":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_is_three_operations_and_leaves_every_tensor_in_its_place():
    slots = state()
    feed(slots, torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(9)), [40])
    key, value, scores = tokens(torch.zeros(2, 2, 1), start=40)
    moments = Moments(torch.full((2, 2), 3.0).double(), torch.full((2, 2), 4.0).double())
    places = [tensor.data_ptr() for tensor in vars(slots.slots).values()]
    with _Operations() as mode:
        slots.step(key, value, scores, moments)
        slots.attend(key, gate="value", scale=None)
    assert mode.names == [
        "sparsetrain::sparsek_decode_update",
        "aten::_foreach_copy_",
        "sparsetrain::sparsek_decode_attention",
    ]
    assert [tensor.data_ptr() for tensor in vars(slots.slots).values()] == places
    assert slots.slots.length.tolist() == slots.lengths == [41, 41]
    assert all(torch.equal(a, b) for a, b in zip(slots.moments(slice(None)), moments, strict=True))


def test_a_forward_pass_with_gradients_on_steps_without_them():
    slots = state()
    feed(slots, torch.randn(1, 2, 40), [40])
    key, value, scores = (tensor.requires_grad_() for tensor in tokens(torch.zeros(1, 2, 1), start=40))
    slots.step(key, value, scores, None)
    assert not slots.attend(key, gate="log", scale=None).requires_grad
