"""``init: attention``: scorers fitted to what keys receive in dense attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.methods.sparsek.fit import received_attention
from sparsetrain.modeling import fit_method, sparse_layers, sparsify

SPARSEK = {"method": "sparsek", "topk": 8, "window": 8, "sinks": 2, "init": "attention"}


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("tile", [1 << 26, 1])
def test_received_attention_is_the_mean_over_queries_beyond_the_window(heads, tile, monkeypatch):
    monkeypatch.setattr("sparsetrain.methods.sparsek.fit.TILE_LOGITS", tile)
    torch.manual_seed(0)
    query, key, bounds = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), [0, 15, 40]
    got, rows = received_attention(query, key, heads, 6, 0.5, torch.tensor(bounds, dtype=torch.int32))
    q, k = query[0].double().numpy(), key[0].double().numpy()
    expected, count = np.zeros((4, 40)), np.zeros(40)
    for start, stop in ((0, 15), (15, 40)):
        for i in range(start, stop):
            for head in range(4):
                weights = np.exp(0.5 * k[head // 2, start : i + 1] @ q[head, i])
                far = slice(start, max(start, i - 6 + 1))
                expected[head, far] += (weights / weights.sum())[: far.stop - start] * (i - start + 1)
            count[start : max(start, i - 6 + 1)] += 1
    expected = (expected / np.maximum(count, 1)).reshape(heads, -1, 40).mean(1)
    np.testing.assert_array_equal(rows.numpy(), count)
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_fitted_scores_predict_attention_on_other_text(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    fit_method(model, [{"input_ids": tokens(300, seed=seed)} for seed in range(4)])
    seen = {}
    _, layer, _ = sparse_layers(model)[0]
    layer.register_forward_pre_hook(lambda m, args, kw: seen.update(hidden=kw["hidden_states"]), with_kwargs=True)
    ids = tokens(300, seed=9)
    with torch.no_grad():
        model(ids, use_cache=False)
        hidden, cos_sin = seen["hidden"], model.model.rotary_emb(seen["hidden"], torch.arange(300)[None])
        q, k = (p(hidden).unflatten(-1, (-1, 64)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        mass, _ = received_attention(*apply_rotary_pos_emb(q, k, *cos_sin), 2, 8, layer.scaling, None)
        scores, _ = layer.sparsek_scorer(hidden)
    for head in range(2):
        pair = torch.stack([scores[0, head, 2:260], mass[0, head, 2:260].log()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.3


def test_an_uncalibrated_model_does_not_run(tiny, tokens):
    with pytest.raises(ModelError, match=r"fit_method\(model, batches\) first"):
        sparsify(tiny("llama"), SPARSEK)(tokens(30))


def test_a_scorer_that_waits_for_a_fit_gives_way_to_another_start(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    sparsify(model, {**SPARSEK, "init": "normal"})
    assert all(layer.sparsek_scorer.weight.std() > 0 for _, layer, _ in sparse_layers(model))
    model(tokens(30), use_cache=False)


def test_calibration_leaves_the_rest_of_the_model_alone(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plans = [method for _, _, method in sparse_layers(model)]
    fit_method(model, [{"input_ids": tokens(200)}])
    assert model.training
    assert [method for _, _, method in sparse_layers(model)] == plans
    assert list(model.state_dict()) == list(before)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"model.layers.{i}.self_attn.sparsek_scorer.weight" for i in range(2)]


def test_a_calibrated_model_survives_saving_and_other_methods(tiny, tokens, tmp_path):
    model = sparsify(tiny("llama"), SPARSEK)
    fit_method(model, [{"input_ids": tokens(200)}])
    logits = model(tokens(60), use_cache=False).logits
    sparsify(sparsify(model, {"method": "full"}), SPARSEK)
    assert torch.equal(model(tokens(60), use_cache=False).logits, logits)
    sparsetrain.save(model, tmp_path)
    assert torch.equal(sparsetrain.load(tmp_path)(tokens(60), use_cache=False).logits, logits)


def test_what_cannot_be_calibrated_is_refused(tiny, tokens):
    with pytest.raises(ModelError, match="no modules to fit to text"):
        fit_method(sparsify(tiny("llama"), {"method": "full"}), [])
    with pytest.raises(ModelError, match="use longer documents"):
        fit_method(sparsify(tiny("llama"), SPARSEK), [{"input_ids": tokens(20)}])
