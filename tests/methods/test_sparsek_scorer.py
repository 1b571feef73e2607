"""Scores: fp32 whatever the model's dtype, normalised by the document's own past, equal in training and generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sparsetrain_kernels.score_placement import DocumentPositions, document_positions, place_scores
from sparsetrain_kernels.score_placement.reference import EPSILON, timestep_norm

from sparsetrain.methods.sparsek.scorer import SparseKScorer, hashed_scores


def scorer(width=16, heads=3, *, normalize=True, trainable=True):
    torch.manual_seed(0)
    made = SparseKScorer(width, heads, normalize=normalize, trainable=trainable)
    torch.nn.init.normal_(made.weight)
    return made


def naive_norm(scores):
    """Each score by mean and variance of those up to it, one at a time in float64."""
    out = np.zeros_like(scores, dtype=np.float64)
    for i in range(scores.shape[-1]):
        past = scores[..., : i + 1].astype(np.float64)
        out[..., i] = (past[..., -1] - past.mean(-1)) / np.sqrt(past.var(-1) + EPSILON)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_fp32_whatever_the_models_dtype(dtype):
    model = scorer().to(dtype)
    x = torch.randn(2, 7, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, gain = model(x)
    exact = np.einsum("bnw,hw->bhn", x.double().numpy(), model.weight.detach().double().numpy())
    assert scores.dtype == gain.dtype == torch.float32
    np.testing.assert_allclose(scores.detach().numpy(), exact, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_a_plain_projection(monkeypatch):
    monkeypatch.setattr("sparsetrain.methods.sparsek.scorer.CHUNK", 5)  # several pieces
    model, x = scorer().double(), torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(model, {"weight": w}, (x,))[0], (x, model.weight)
    )


def test_backward_keeps_no_wide_copy_of_the_input():
    x = torch.randn(1, 64, 16, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scorer()(x)
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]


def test_a_frozen_scorer_has_nothing_to_train_but_is_saved():
    model = scorer(trainable=False)
    assert list(model.parameters()) == []
    assert model.state_dict().keys() == scorer().state_dict().keys() == {"weight", "gain"}


def test_normalisation_is_that_of_the_prefix():
    scores = torch.randn(2, 3, 50) * 4 + 7
    got, _ = timestep_norm(scores, document_positions(50, None, scores.device))
    np.testing.assert_allclose(got.numpy(), naive_norm(scores.numpy()), rtol=1e-9, atol=1e-9)


def test_packed_documents_are_normalised_each_on_its_own():
    cu_seqlens = torch.tensor([0, 20, 20, 21, 50], dtype=torch.int32)
    scores, gain = torch.randn(1, 3, 50) * 3, torch.rand(1, 3, 1).expand(1, 3, 50) + 0.5
    packed, _ = place_scores(scores, gain, document_positions(50, cu_seqlens, scores.device), 1e-2)
    for start, stop in ((0, 20), (20, 21), (21, 50)):
        own = scores[..., start:stop]
        alone, _ = place_scores(own, gain[..., start:stop], document_positions(stop - start, None, own.device), 1e-2)
        torch.testing.assert_close(packed[..., start:stop], alone, rtol=1e-6, atol=1e-6)


def test_the_past_does_not_change_when_a_token_is_added():
    scores = torch.randn(1, 2, 40)
    longer = torch.cat([scores, 100 * torch.randn(1, 2, 5)], dim=-1)
    short, _ = timestep_norm(scores, document_positions(40, None, scores.device))
    long, _ = timestep_norm(longer, document_positions(45, None, scores.device))
    assert torch.equal(long[..., :40], short)


@pytest.mark.parametrize("chunks", [[1] * 60, [25, 35], [1, 30, 29]])
def test_token_by_token_equals_all_at_once(chunks):
    scores, gain = torch.randn(2, 3, 60) * 5 - 2, torch.full((2, 3, 60), 1.5)
    whole, _ = place_scores(scores, gain, document_positions(60, None, scores.device), 1e-3)
    moments, pieces, read = None, [], 0
    for piece, piece_gain in zip(scores.split(chunks, -1), gain.split(chunks, -1)):
        places = document_positions(piece.shape[-1], None, scores.device)
        got, moments = place_scores(
            piece, piece_gain, DocumentPositions(places.position + read, places.first), 1e-3, moments
        )
        pieces.append(got)
        read += piece.shape[-1]
    torch.testing.assert_close(torch.cat(pieces, -1), whole, rtol=1e-6, atol=1e-6)


def test_no_drift_at_a_million_tokens():
    scores = np.random.default_rng(0).normal(3.0, 1.0, 1_000_000).astype(np.float32)
    got, _ = timestep_norm(
        torch.from_numpy(scores)[None, None], document_positions(1_000_000, None, torch.device("cpu"))
    )
    wide = scores.astype(np.longdouble)
    expected = (wide[-1] - wide.mean()) / np.sqrt(wide.var() + EPSILON)
    assert abs(float(got[0, 0, -1]) - float(expected)) < 1e-9


def test_the_slope_joins_after_the_normalisation():
    scores, gain, places = (
        torch.randn(1, 2, 30),
        torch.ones(1, 2, 30),
        document_positions(30, None, torch.device("cpu")),
    )
    flat, _ = place_scores(scores, gain, places, 0.0)
    steep, _ = place_scores(scores, gain, places, 0.5)
    torch.testing.assert_close(steep - flat, (0.5 * torch.arange(30.0)).expand(1, 2, 30), rtol=1e-5, atol=1e-5)


def test_normalisation_passes_finite_differences():
    places = document_positions(9, torch.tensor([0, 4, 9], dtype=torch.int32), torch.device("cpu"))
    scores = torch.randn(1, 2, 9, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(1, 2, 1, dtype=torch.float64).expand(1, 2, 9).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s, g: place_scores(s, g, places, 1e-2)[0], (scores, gain))


def test_random_scores_are_normal_and_depend_on_layer_head_and_position():
    places, like = document_positions(20_000, None, torch.device("cpu")), torch.zeros(2, 4, 1, 1)
    first, second = hashed_scores(4, 0, places, like=like), hashed_scores(4, 1, places, like=like)
    assert first.shape == (2, 4, 20_000)
    assert torch.equal(first, hashed_scores(4, 0, places, like=like))
    rows = torch.cat([first[0], second[0]])
    assert rows.mean(1).abs().max() < 0.03
    assert (rows.std(1) - 1).abs().max() < 0.03
    assert (torch.corrcoef(rows) - torch.eye(8)).abs().max() < 0.04
    assert (rows[:, 1:] * rows[:, :-1]).mean(1).abs().max() < 0.04
