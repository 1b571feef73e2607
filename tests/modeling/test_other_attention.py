"""A model never attends by another method than the one that its config records."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.generation.continuous_batching import continuous_api

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparsify

POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1}


@pytest.mark.parametrize("attention", [POWER, {**POWER, "dense_layers": [0]}, {"method": "full"}], ids=str)
def test_a_model_switched_to_another_attention_refuses_to_run_and_to_be_saved(attention, tiny, tokens, tmp_path):
    model = sparsify(tiny("llama"), attention)
    expected = model(tokens(30)).logits
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match=r"attn_implementation='sdpa'.*set_attn_implementation\('sparsetrain'\)"):
        model(tokens(30))
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        sparsetrain.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.set_attn_implementation("sparsetrain")
    assert torch.equal(model(tokens(30)).logits, expected)
    sparsetrain.save(model, tmp_path / "model")


def test_save_pretrained_writes_what_a_switched_model_was_trained_with(tiny, tokens, tmp_path):
    """It has no pass behind it with another attention, so the record is right whatever the config asks for."""
    model = sparsify(tiny("llama"), POWER)
    expected = model(tokens(30)).logits
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(sparsetrain.load(tmp_path / "model")(tokens(30)).logits, expected)


def test_a_copy_of_a_model_refuses_too(tiny, tokens):
    model = copy.deepcopy(sparsify(tiny("llama"), POWER))
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="attn_implementation='eager'"):
        model(tokens(30))


def test_sparsify_again_takes_a_switched_model_back(tiny, tokens):
    model = sparsify(tiny("llama"), POWER)
    expected = model(tokens(30)).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(sparsify(model, POWER)(tokens(30)).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_continuous_batching_does_not_make_a_model_dense(family, tiny, tokens, monkeypatch):
    """As on a machine where flash attention is installed."""
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: True)
    model = sparsify(tiny(family), POWER)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ModelError, match=r"generate_batch\) would run .* densely.*call model.generate"):
            each.generate_batch([tokens(30)[0].tolist()])
        with pytest.raises(ModelError, match="continuous batching"), each.continuous_batching_context_manager():
            pass
    model.destroy_cached_continuous_batching_manager()
    with pytest.raises(ValueError, match="sparsetrain is not supported for continuous batching"):
        model.generate_batch([tokens(30)[0].tolist()])
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "sparsetrain"


def test_a_mask_that_generate_made_of_a_pad_token_is_explained(tiny, tokens):
    model, ids = sparsify(tiny("llama"), POWER), tokens(20)
    pad = {"pad_token_id": int(ids[0, 5]), "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with pytest.raises(ModelError, match=r"holds pad_token_id.*attention_mask=torch\.ones_like\(input_ids\)"):
        model.generate(ids, **pad)
    pad["attention_mask"] = torch.ones_like(ids)
    alone = model.generate(ids, **pad)
    assert alone.shape[1] == 23
    with pytest.raises(ModelError, match=r"an assistant_model.*pad_token_id=eos_token_id"):
        model.generate(ids, assistant_model=model, **pad)
    same = {"pad_token_id": 95, "eos_token_id": 95}
    assert torch.equal(model.generate(ids, assistant_model=model, **{**pad, **same}), alone)
