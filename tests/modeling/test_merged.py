"""Projections of one input as one product: the same numbers, the same names, and the same memory."""

from __future__ import annotations

import copy

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


def change_in_place(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1).add_(0.01)


def give_other_weights(model):
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data = attention.v_proj.weight.data * 2
    attention.q_proj.bias = torch.nn.Parameter(attention.q_proj.bias.data + 1)


def load_again(model):
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [change_in_place, give_other_weights, load_again, lambda model: model.to(torch.float64), copy.deepcopy],
    ids=["in place", "other weights", "loaded", "to", "copied"],
)
@torch.no_grad()
def test_a_model_that_changes_afterwards_stays_right(tiny, tokens, change):
    plain, model = tiny("qwen2"), tiny("qwen2")
    merge_projections(model)
    model(tokens(3))
    before = tiny("qwen2")(tokens(3)).logits
    plain, model = change(plain) or plain, change(model) or model
    for count in (3, 3, 33):
        torch.testing.assert_close(model(tokens(count)).logits, plain(tokens(count)).logits, rtol=1e-4, atol=1e-5)
    if change is not copy.deepcopy:
        assert not torch.equal(model(tokens(3)).logits.float(), before)


def test_weights_of_other_types_are_left_alone(tiny):
    class Quantized(torch.Tensor):
        pass

    model = tiny("llama")
    projection = model.model.layers[0].mlp.up_proj
    weight = projection.weight.data.as_subclass(Quantized)
    projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert merge_projections(model) == 2 * model.config.num_hidden_layers - 1


def test_a_merged_model_is_stored_as_it_was(tiny, tmp_path):
    plain, model = tiny("llama"), tiny("llama")
    merge_projections(model)
    sizes = []
    for name, each in (("plain", plain), ("merged", model)):
        each.save_pretrained(tmp_path / name)
        sizes.append((tmp_path / name / "model.safetensors").read_bytes())
    assert sizes[0] == sizes[1]
