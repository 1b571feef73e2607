"""A sparsified model computes exactly what its own dense code computes under the same visibility."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling import sparse_layers, sparsify

POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1}
BASELINES = [
    {"method": "sliding", "block": 4, "window": 3, "sinks": 1},
    {"method": "stride", "block": 4, "window": 2, "sinks": 1, "stride": 5},
    {"method": "dilated", "block": 4, "window": 4, "dilation": 2},
    {"method": "longnet", "block": 4, "segments": [[4, 1], [8, 2]]},
    {"method": "ruler", "block": 4, "window": 1, "sinks": 1},
]
SETTINGS = {"rtol": 1e-4, "atol": 1e-4}


def additive(visible) -> torch.Tensor:
    """A bool mask ``[n, n]`` as the additive 4-D mask of eager attention."""
    return torch.where(torch.as_tensor(visible), 0.0, torch.finfo(torch.float32).min)[None, None]


def masked_logits(model, ids, visible):
    """Logits of an eager model whose global layers see ``visible``; sliding layers keep their window."""
    length = ids.shape[1]
    mask = additive(visible)
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
        position = torch.arange(length)
        distance = position[:, None] - position
        window = additive((distance >= 0) & (distance < model.config.sliding_window))
        mask = {"full_attention": mask, "sliding_attention": window}
    return model(ids, attention_mask=mask, use_cache=False).logits


def test_full_equals_the_models_own_attention(family, tiny, eager, tokens):
    model = tiny(family)
    expected = eager(model)(tokens(45)).logits
    torch.testing.assert_close(sparsify(model, {"method": "full"})(tokens(45)).logits, expected, **SETTINGS)


def test_power_on_a_covered_length_equals_the_models_own_attention(family, tiny, eager, tokens):
    model = tiny(family)
    expected = eager(model)(tokens(15)).logits
    torch.testing.assert_close(sparsify(model, {**POWER, "window": 4})(tokens(15)).logits, expected, **SETTINGS)


def test_power_equals_the_models_own_attention_under_its_mask(family, tiny, eager, tokens):
    model, ids = tiny(family), tokens(45)
    reference = eager(model)
    expected = masked_logits(reference, ids, parse_attention(POWER).pattern().token_mask(45, 45))
    actual = sparsify(model, POWER)(ids).logits
    torch.testing.assert_close(actual, expected, **SETTINGS)
    assert (actual - reference(ids).logits)[:, 16:].abs().max() > 1e-2, "the mask should have mattered"


@pytest.mark.parametrize("attention", BASELINES, ids=lambda attention: attention["method"])
def test_baselines_equal_dense_attention_under_their_masks(attention, tiny, eager, tokens):
    model, ids = tiny("llama"), tokens(45)
    expected = masked_logits(eager(model), ids, parse_attention(attention).pattern().token_mask(45, 45))
    torch.testing.assert_close(sparsify(model, attention)(ids).logits, expected, **SETTINGS)


def test_longnet_head_shift_gives_each_kv_head_its_own_mask(tiny, eager, tokens):
    attention = {"method": "longnet", "block": 4, "segments": [[2, 1], [8, 2]], "head_shift": True}
    model, ids = tiny("llama"), tokens(45)
    pattern = parse_attention(attention).pattern(num_kv_heads=2)
    by_kv_head = torch.stack([torch.as_tensor(pattern.token_mask(45, 45, head=head)) for head in range(2)])
    assert not torch.equal(by_kv_head[0], by_kv_head[1])
    mask = additive(by_kv_head.repeat_interleave(2, dim=0))[0]
    expected = eager(model)(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(sparsify(model, attention)(ids).logits, expected, **SETTINGS)


def test_power_by_head_gives_each_kv_head_its_own_mask(tiny, eager, tokens):
    attention = {"method": "power", "block": 4, "window": 1, "sinks": 0, "split": "heads", "farthest": 8}
    model, ids, length = tiny("llama"), tokens(45), 45
    distance = torch.arange(length)[:, None] // 4 - torch.arange(length) // 4
    causal = torch.ones(length, length).tril() > 0
    by_kv_head = [causal & torch.isin(distance, torch.tensor(read)) for read in ([0, 1, 4], [0, 2, 8])]
    mask = additive(torch.stack(by_kv_head).repeat_interleave(2, dim=0))[0]
    expected = eager(model)(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(sparsify(model, attention)(ids).logits, expected, **SETTINGS)


def test_power_by_layer_gives_each_layer_that_takes_it_its_own_mask(tiny, eager, tokens):
    attention = {"method": "power", "block": 4, "window": 1, "sinks": 0, "split": "layers", "farthest": 4}
    model, ids, length = tiny("llama", num_hidden_layers=5), tokens(45), 45
    dense = eager(model)
    distance = torch.arange(length)[:, None] // 4 - torch.arange(length) // 4
    causal = torch.ones(length, length).tril() > 0
    # The second layer stays dense; the others take distances 1, 2, 4 and 1 again.
    masks = [causal & ((distance == 0) | (distance == read)) for read in (1, 2, 4, 1)]
    masks.insert(1, causal)
    for layer, mask in zip(dense.model.layers, masks, strict=True):
        hand_over = partial(_with_mask, additive(mask))
        layer.self_attn.register_forward_pre_hook(hand_over, with_kwargs=True)
    expected = dense(ids, use_cache=False).logits
    sparsify(model, {**attention, "dense_layers": [1]})
    torch.testing.assert_close(model(ids).logits, expected, **SETTINGS)


def _with_mask(mask, layer, args, kwargs):
    return args, {**kwargs, "attention_mask": mask}


def test_dense_layers_keep_full_attention(tiny, eager, tokens):
    model, ids = tiny("llama", num_hidden_layers=3), tokens(45)
    dense = eager(model)
    sparsify(model, {**POWER, "dense_layers": [0, -1]})
    assert [method is None for _, _, method in sparse_layers(model)] == [True, False, True]

    hidden = model.model(ids, output_hidden_states=True).hidden_states
    reference = dense.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[1], reference[1], **SETTINGS)
    assert (hidden[2] - reference[2]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
def test_hybrid_models_keep_their_sliding_layers_unless_told(family, tiny):
    model = tiny(family)
    sparsify(model, POWER)
    assert [method is None for _, _, method in sparse_layers(model)] == [True, False]
    sparsify(model, {**POWER, "replace_sliding_layers": True})
    assert all(method is not None for _, _, method in sparse_layers(model))


def test_replaced_sliding_layers_see_beyond_their_window(tiny, eager, tokens):
    model, ids = tiny("mistral", sliding_window=7), tokens(45)
    visible = parse_attention(POWER).pattern().token_mask(45, 45)
    expected = eager(model)(ids, attention_mask=additive(visible), use_cache=False).logits
    actual = sparsify(model, {**POWER, "replace_sliding_layers": True})(ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, **SETTINGS)


def test_sparsifying_again_replaces_the_method(tiny, tokens):
    once, twice = tiny("llama"), tiny("llama")
    sparsify(sparsify(twice, BASELINES[0]), POWER)
    torch.testing.assert_close(twice(tokens(45)).logits, sparsify(once, POWER)(tokens(45)).logits, rtol=0, atol=0)
    assert twice.config.sparsetrain["attention"]["method"] == "power"


def test_a_multimodal_wrapper_is_sparsified_in_its_text_decoder(tiny, tokens):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny("gemma3_text")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text.config.to_dict(), vision_config={**vision, "image_size": 28})
    wrapper = Gemma3ForConditionalGeneration(config).eval()
    wrapper.model.language_model.load_state_dict(text.model.state_dict())
    wrapper.lm_head.load_state_dict(text.lm_head.state_dict())

    sparsify(wrapper, POWER)
    assert len(sparse_layers(wrapper)) == 2
    assert wrapper.config.vision_config._attn_implementation != "sparsetrain"
    expected = sparsify(copy.deepcopy(text), POWER)(tokens(45)).logits
    torch.testing.assert_close(wrapper(tokens(45)).logits, expected, **SETTINGS)
