"""Projections of one input as one product: the same numbers, the same names, and the same memory."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.modeling.merged import ROWS, merge_projections


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
@torch.no_grad()
def test_few_rows_and_many_give_what_they_gave(tiny, tokens, family):
    plain, model = tiny(family), tiny(family)
    layers = model.config.num_hidden_layers
    # Queries, keys and values, and the halves of the MLP; phi3 and gpt2 have one matrix of each already.
    assert merge_projections(model) == (2 * layers if family in ("llama", "qwen2") else 0)
    for count in (1, ROWS, ROWS + 1, 33):
        ids = tokens(count)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def test_one_product_takes_the_place_of_several(tiny, tokens, monkeypatch):
    model, calls = tiny("llama"), []
    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: calls.append(1) or original(*given))

    def count(rows: int) -> int:
        calls.clear()
        model(tokens(rows))
        return len(calls)

    before = count(4)
    merge_projections(model)
    assert count(4) == before - 3 * model.config.num_hidden_layers
    assert count(33) == before


def test_gradients_flow_as_before(tiny, tokens):
    plain, model = tiny("llama"), tiny("llama")
    merge_projections(model)
    for each in (plain, model):
        each(tokens(5)).logits.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


@torch.no_grad()
def test_modules_that_are_watched_or_used_apart_stay_right(tiny, tokens):
    plain, model = tiny("llama"), tiny("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: out)
    assert merge_projections(model) == 2 * model.config.num_hidden_layers - 1
    attention, hidden = model.model.layers[1].self_attn, torch.randn(1, 2, model.config.hidden_size)
    attention.q_proj(hidden)
    other = hidden + 1
    want = plain.model.layers[1].self_attn.k_proj(other)
    torch.testing.assert_close(attention.k_proj(other), want)
    torch.testing.assert_close(attention.v_proj(hidden), plain.model.layers[1].self_attn.v_proj(hidden))
