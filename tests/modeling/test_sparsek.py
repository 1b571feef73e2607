"""SparseK in whole models: the definition, its gradients, who sees whom, and layers that change their method."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from selected_oracle import attend, select
from sparsetrain_kernels.score_placement.reference import EPSILON
from transformers import DynamicCache

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparse_layers, sparsify

SPARSEK = {"method": "sparsek", "topk": 5, "window": 6, "sinks": 2, "slope": 1e-3}
TIGHT = {"rtol": 1e-4, "atol": 1e-4}


def scorers(model):
    return [layer.sparsek_scorer for _, layer, _ in sparse_layers(model) if hasattr(layer, "sparsek_scorer")]


def captured(model, ids, **kwargs):
    """Input, query, key, value and output of the first SparseK layer's attention in one pass."""
    found = {}
    _, layer, method = next(entry for entry in sparse_layers(model) if entry[2] is not None)
    inner = method._select_and_attend

    def spy(module, query, key, value, scores, topk, cu_seqlens, scale):
        out = inner(module, query, key, value, scores, topk, cu_seqlens, scale)
        if module is layer:
            found.update(query=query, key=key, value=value, out=out, scale=scale)
        return out

    def look(module, args, kwargs):
        found["hidden"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    hook = layer.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    method._select_and_attend = spy
    with torch.no_grad():
        model(ids, use_cache=False, **kwargs)
    del method._select_and_attend
    hook.remove()
    return layer, {name: t.double().numpy() if torch.is_tensor(t) else t for name, t in found.items()}


def oracle_scores(hidden, weight, gain, slope, bounds):
    """Scores from the formulas, token by token in float64."""
    linear = np.einsum("bnw,hw->bhn", hidden, weight)
    out = np.zeros_like(linear)
    for start, stop in pairwise(bounds):
        for i in range(start, stop):
            past = linear[..., start : i + 1]
            normal = (past[..., -1] - past.mean(-1)) / np.sqrt(past.var(-1) + EPSILON)
            out[..., i] = normal * gain + slope * (i - start)
    return out


@pytest.mark.parametrize("gate", ["value", "log", "straight"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3", "gpt_neox"])
def test_a_layer_is_the_definition(family, gate, tiny, tokens):
    model = sparsify(tiny(family), {**SPARSEK, "gate": gate})
    with torch.no_grad():
        for scorer in scorers(model):
            scorer.gain.uniform_(0.3, 0.9)
    bounds = [0, 17, 48]
    layer, seen = captured(model, tokens(48), cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **positions(bounds))
    weight, gain = (t.detach().double().numpy() for t in (layer.sparsek_scorer.weight, layer.sparsek_scorer.gain))
    scores = oracle_scores(seen["hidden"], weight, gain, 1e-3, bounds)
    selection = select(torch.from_numpy(scores), 5, 6, 2, bounds)
    expected, _ = attend(
        seen["query"] * seen["scale"] * seen["query"].shape[-1] ** 0.5,
        seen["key"],
        seen["value"],
        scores,
        selection.threshold,
        selection.exit,
        window=6,
        sinks=2,
        gate=gate,
        bounds=bounds,
    )
    np.testing.assert_allclose(seen["out"], expected, rtol=2e-4, atol=2e-5)


def positions(bounds):
    lengths = [b - a for a, b in pairwise(bounds)]
    return {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def test_with_room_for_all_it_is_dense_attention(family, tiny, eager, tokens):
    if family in ("gemma2", "gpt_oss"):
        pytest.skip("refused: see test_models_it_cannot_take_are_refused")
    model = tiny(family)
    dense = eager(model)(tokens(45)).logits
    sparsify(model, {**SPARSEK, "topk": 45})
    torch.testing.assert_close(model(tokens(45), use_cache=False).logits, dense, **TIGHT)


@pytest.mark.parametrize(("family", "reason"), [("gemma2", "soft-capped logits"), ("gpt_oss", "sink logits")])
def test_models_it_cannot_take_are_refused(family, reason, tiny):
    with pytest.raises(ModelError, match=rf"layer 1 .* has .*{reason}"):
        sparsify(tiny(family), SPARSEK)


def test_packed_documents_are_strangers(tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), tokens(90)
    place = positions([0, 40, 90])
    before = model(ids, use_cache=False, **place).logits
    changed = ids.clone()
    changed[:, :40] = tokens(40, seed=9)
    after = model(changed, use_cache=False, **place).logits
    assert torch.equal(before[:, 40:], after[:, 40:])
    alone = model(ids[:, 40:], use_cache=False).logits
    torch.testing.assert_close(before[:, 40:], alone, **TIGHT)


def test_rows_of_a_batch_may_be_packed_differently(tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), torch.cat([tokens(60), tokens(60, seed=1)])
    place = torch.cat([positions([0, 25, 60])["position_ids"], torch.arange(60)[None]])
    together = model(ids, position_ids=place, use_cache=False).logits
    for row in range(2):
        alone = model(ids[row : row + 1], position_ids=place[row : row + 1], use_cache=False).logits
        torch.testing.assert_close(together[row : row + 1], alone, **TIGHT)


def test_the_future_is_never_seen(tiny, tokens):
    model, ids = sparsify(tiny("qwen3"), SPARSEK), tokens(70)
    changed = ids.clone()
    changed[:, 50:] = tokens(20, seed=5)
    before, after = (model(x, use_cache=False).logits for x in (ids, changed))
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50:], after[:, 50:])


def test_padded_batches_equal_each_row_alone(tiny, tokens):
    model, rows = sparsify(tiny("llama"), SPARSEK), [tokens(50), tokens(31, seed=1)]
    ids, mask = torch.zeros(2, 50, dtype=torch.long), torch.zeros(2, 50, dtype=torch.long)
    for side in ("left", "right"):
        ids.zero_(), mask.zero_()
        for row, own in enumerate(rows):
            where = slice(50 - own.shape[1], 50) if side == "left" else slice(0, own.shape[1])
            ids[row, where], mask[row, where] = own[0], 1
        place = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=place, use_cache=False).logits
        for row, own in enumerate(rows):
            alone = model(own, use_cache=False).logits[0]
            torch.testing.assert_close(logits[row][mask[row].bool()], alone, **TIGHT)


@pytest.mark.parametrize("gate", ["value", "log"])
def test_gradients_of_the_scorer_pass_finite_differences(gate, tiny, tokens):
    # GPT-2: the norms of the others compute in fp32.
    model = sparsify(tiny("gpt2").double(), {**SPARSEK, "gate": gate})
    ids = tokens(60)

    def loss():
        logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])

    loss().backward()
    generator, step = torch.Generator().manual_seed(0), 1e-7
    for parameter in [p for scorer in scorers(model) for p in scorer.parameters()]:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for change in (step, -2 * step):
                parameter.add_(change * direction)
                losses.append(float(loss()))
            parameter.add_(step * direction)
        expected = float((parameter.grad * direction).sum())
        assert abs(expected) > 1e-3
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=5e-6)


def test_gradient_checkpointing_changes_nothing(tiny, tokens):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, ids = sparsify(tiny("llama"), SPARSEK).train(), tokens(60)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([scorer.weight.grad for scorer in scorers(model)])
    for plain, checkpointed in zip(*gradients):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed)


def test_one_selection_a_head_or_one_a_layer(tiny, tokens):
    per_head = sparsify(tiny("llama"), SPARSEK)
    assert [scorer.weight.shape for scorer in scorers(per_head)] == [(2, 64)] * 2
    shared = sparsify(tiny("llama"), {**SPARSEK, "scores": "layer"})
    assert [scorer.weight.shape for scorer in scorers(shared)] == [(1, 64)] * 2
    with torch.no_grad():
        for one, several in zip(scorers(shared), scorers(per_head)):
            several.weight.copy_(one.weight.expand_as(several.weight))
    ids = tokens(60)
    torch.testing.assert_close(
        shared(ids, use_cache=False).logits, per_head(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5
    )


def test_dense_layers_have_no_scorer(tiny, tokens):
    model = sparsify(tiny("llama"), {**SPARSEK, "dense_layers": [0]})
    assert [name for name, _ in model.named_parameters() if "sparsek" in name] == [
        "model.layers.1.self_attn.sparsek_scorer.weight",
        "model.layers.1.self_attn.sparsek_scorer.gain",
    ]
    model(tokens(45), use_cache=False)


def test_sliding_layers_of_hybrid_models_keep_their_window(tiny, tokens):
    model = sparsify(tiny("gemma3_text"), SPARSEK)
    assert [method is not None for _, _, method in sparse_layers(model)] == [False, True]
    model(tokens(45), use_cache=False)


def test_a_frozen_scorer_is_not_trained(tiny, tokens):
    model = sparsify(tiny("llama"), {**SPARSEK, "scorer": "frozen"})
    assert not [name for name, _ in model.named_parameters() if "sparsek" in name]
    model(tokens(45), labels=tokens(45), use_cache=False).loss.backward()


def test_only_a_detached_selection_teaches_nothing_to_what_it_reads(tiny, tokens):
    ids, grads, logits = tokens(60), {}, {}
    for scorer in ("frozen", "detached"):
        torch.manual_seed(0)
        model = sparsify(tiny("llama"), {**SPARSEK, "scorer": scorer, "gate": "straight"})
        assert not [name for name, _ in model.named_parameters() if "sparsek" in name]
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        grads[scorer], logits[scorer] = model.get_input_embeddings().weight.grad, out.logits
    assert torch.equal(logits["frozen"], logits["detached"])
    assert not torch.allclose(grads["frozen"], grads["detached"])


def test_random_scores_need_no_network(tiny, tokens):
    model = sparsify(tiny("llama"), {**SPARSEK, "scorer": "random"})
    assert not [name for name in model.state_dict() if "sparsek" in name]
    logits = model(tokens(60), use_cache=False).logits
    assert torch.equal(logits, model(tokens(60), use_cache=False).logits)
    window = sparsify(tiny("llama"), {**SPARSEK, "topk": 1})(tokens(60), use_cache=False).logits
    assert not torch.allclose(logits, window)


def test_scores_without_normalisation(tiny, tokens):
    model, ids = sparsify(tiny("llama"), {**SPARSEK, "normalize": False}), tokens(60)
    assert [name for name, _ in scorers(model)[0].named_parameters()] == ["weight"]
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert scorers(model)[0].weight.grad.abs().max() > 0


def hooks(model):
    return [len(layer._forward_pre_hooks) for _, layer, _ in sparse_layers(model)]


def test_another_method_takes_the_scorer_out_and_sparsek_puts_it_back(tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), tokens(60)
    weights = [p for scorer in scorers(model) for p in scorer.parameters()]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.5)
    trained, names = model(ids, use_cache=False).logits, list(model.state_dict())
    sparsify(model, {"method": "full"})
    assert not [name for name in model.state_dict() if "sparsek" in name]
    dense = sparsify(tiny("llama"), {"method": "full"})
    assert hooks(model) == hooks(dense)
    assert torch.equal(model(ids, use_cache=False).logits, dense(ids, use_cache=False).logits)
    sparsify(model, SPARSEK)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(weights, (p for scorer in scorers(model) for p in scorer.parameters())))
    assert torch.equal(model(ids, use_cache=False).logits, trained)


def test_sparsifying_twice_adds_nothing_twice(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    before, held = model(tokens(60), use_cache=False).logits, hooks(model)
    sparsify(model, {**SPARSEK, "topk": 7})
    sparsify(model, SPARSEK)
    assert hooks(model) == held
    assert torch.equal(model(tokens(60), use_cache=False).logits, before)


def test_another_granularity_starts_a_new_scorer(tiny):
    model = sparsify(tiny("llama"), SPARSEK)
    sparsify(model, {**SPARSEK, "scores": "layer"})
    assert scorers(model)[0].weight.shape == (1, 64)


def test_a_copied_model_has_scorers_of_its_own(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    before, other = model(tokens(60), use_cache=False).logits, copy.deepcopy(model)
    with torch.no_grad():
        for scorer in scorers(other):
            scorer.weight.normal_()
    assert torch.equal(model(tokens(60), use_cache=False).logits, before)
    assert not torch.equal(other(tokens(60), use_cache=False).logits, before)
    sparsify(other, {"method": "full"})
    assert hooks(other) == hooks(sparsify(tiny("llama"), {"method": "full"}))
    assert torch.equal(model(tokens(60), use_cache=False).logits, before)


def test_the_scorer_takes_the_layers_dtype(tiny):
    model = sparsify(tiny("llama").to(torch.bfloat16), SPARSEK)
    assert {scorer.weight.dtype for scorer in scorers(model)} == {torch.bfloat16}


def test_the_warm_up_is_for_training_only(tiny, tokens):
    plain = sparsify(tiny("llama"), SPARSEK)
    model = sparsify(tiny("llama"), {**SPARSEK, "topk_start": 50, "topk_steps": 4})
    model.load_state_dict(plain.state_dict())
    methods = {id(method): method for _, _, method in sparse_layers(model)}
    assert len(methods) == 1
    next(iter(methods.values())).begin_step(0, 100)
    ids, dense = tokens(50), sparsify(tiny("llama"), {"method": "full"})
    torch.testing.assert_close(model.train()(ids, use_cache=False).logits, dense(ids, use_cache=False).logits, **TIGHT)
    assert torch.equal(model.eval()(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)


def test_generation_has_the_places_of_the_config_in_training_mode_too(tiny, tokens):
    model, ids = sparsify(tiny("llama"), {**SPARSEK, "topk_start": 50, "topk_steps": 4}), tokens(50)
    sparse_layers(model)[0][2].begin_step(0, 100)
    wanted = model.eval()(ids, use_cache=False).logits
    assert not torch.allclose(model.train()(ids, use_cache=False).logits, wanted, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, past_key_values=DynamicCache()).logits, wanted, **TIGHT)
        cache = DynamicCache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(20, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **TIGHT)


def test_observations_by_layer_only_while_observing(tiny, tokens):
    model, ids = sparsify(tiny("llama"), SPARSEK), tokens(80)
    method = sparse_layers(model)[0][2]
    model(ids, use_cache=False)
    assert method.observations() == {}
    method.observing = True
    model(ids, use_cache=False)
    found = method.observations()
    names = {
        *("kept_mass", "support_size", "saturated_share", "interior_size", "score_mean", "score_std"),
        *("older_than_1_window", "older_than_4_windows"),
    }
    assert found.keys() == {f"sparsek/{name}/layer_{layer:02}" for name in names for layer in (0, 1)}
    assert 0.2 < found["sparsek/kept_mass/layer_00"] <= 1
    assert found["sparsek/support_size/layer_00"] >= 5
    assert 0.5 < found["sparsek/score_std/layer_00"] < 2
    assert method.observations() == {}


def test_a_row_too_short_to_select_from_leaves_out_what_it_cannot_tell(tiny, tokens):
    model = sparsify(tiny("llama"), SPARSEK)
    method = sparse_layers(model)[0][2]
    method.observing = True
    model(tokens(8), use_cache=False)
    found = method.observations()
    assert "sparsek/score_mean/layer_00" in found
    assert "sparsek/kept_mass/layer_00" not in found
