"""Scorers are saved with the model and come back exactly; a checkpoint that lacks them is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparse_layers

SPARSEK = {"method": "sparsek", "topk": 5, "window": 6, "sinks": 2}


@pytest.fixture
def trained(tiny):
    """A model whose scorers are not as they were initialised."""
    model = sparsetrain.sparsify(tiny("llama"), SPARSEK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sparsek" in name:
                parameter.normal_()
    return model


def logits(model, tokens):
    return model(tokens(60), use_cache=False).logits


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_scorers_come_back_exactly(shard, trained, tokens, tmp_path):
    trained.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    loaded = sparsetrain.load(tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(trained, tokens))


def test_nothing_is_reported_as_unexpected(trained, tmp_path, caplog):
    sparsetrain.save(trained, tmp_path)
    sparsetrain.load(tmp_path)
    assert "UNEXPECTED" not in caplog.text
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "UNEXPECTED" in caplog.text, "plain transformers still says what it drops"


def test_scorers_come_back_in_another_dtype_and_on_a_device_map(trained, tmp_path):
    sparsetrain.save(trained, tmp_path)
    loaded = sparsetrain.load(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    for (_, new, _), (_, old, _) in zip(sparse_layers(loaded), sparse_layers(trained)):
        assert torch.equal(new.sparsek_scorer.weight, old.sparsek_scorer.weight.bfloat16())


@pytest.mark.parametrize(
    "variant", [{"scorer": "frozen"}, {"scores": "layer", "normalize": False}, {"scorer": "random"}]
)
def test_every_kind_of_scorer_comes_back(variant, tiny, tokens, tmp_path):
    model = sparsetrain.sparsify(tiny("llama"), {**SPARSEK, **variant})
    sparsetrain.save(model, tmp_path)
    assert torch.equal(logits(sparsetrain.load(tmp_path), tokens), logits(model, tokens))


def test_plain_transformers_loads_the_dense_model(trained, tiny, eager, tokens, tmp_path):
    sparsetrain.save(trained, tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {name for name in trained.state_dict() if "sparsek" in name}
    torch.testing.assert_close(plain(tokens(60)).logits, eager(tiny("llama"))(tokens(60)).logits)


def test_a_checkpoint_without_scorers_is_refused(trained, tmp_path):
    sparsetrain.save(trained, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    without = {name: tensor for name, tensor in weights.items() if "sparsek" not in name}
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="records sparsek but holds no weights of sparsek_scorer"):
        sparsetrain.load(tmp_path)


def test_a_checkpoint_that_lacks_one_tensor_is_refused_by_its_name(trained, tmp_path):
    sparsetrain.save(trained, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.sparsek_scorer.gain"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"nothing for model\.layers\.1\.self_attn\.sparsek_scorer\.gain"):
        sparsetrain.load(tmp_path)


def test_a_record_that_does_not_fit_the_tensors_is_refused(trained, tmp_path):
    sparsetrain.save(trained, tmp_path)
    config, record = (json.loads((tmp_path / name).read_text()) for name in ("config.json", "sparsetrain.json"))
    config["sparsetrain"]["attention"]["scores"] = record["attention"]["scores"] = "layer"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "sparsetrain.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"shape \(2, 64\) for .*weight, where .* shape \(1, 64\)"):
        sparsetrain.load(tmp_path)


def test_set_aside_scorers_are_not_saved(trained, tmp_path):
    sparsetrain.save(sparsetrain.sparsify(trained, {"method": "full"}), tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "sparsek" in name]
    sparsetrain.load(tmp_path)


def test_a_saved_model_generates_as_it_did(trained, tokens, tmp_path):
    sparsetrain.save(trained, tmp_path)
    greedy = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    loaded = sparsetrain.load(tmp_path)
    assert loaded.generate(tokens(20), **greedy).tolist() == trained.generate(tokens(20), **greedy).tolist()
