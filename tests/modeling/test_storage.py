"""Saving keeps the method; loading restores it, plain transformers sees the dense model, and misfits are explained."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.modeling import load_model
from sparsetrain.recipe.schema import ModelSection

POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1, "dense_layers": [0]}
BEFORE = {"method", "dense_layers", "replace_sliding_layers", "block", "window", "sinks"}
"""The fields of power in folders that were saved before it had variants."""
AS_PUBLISHED = {"base": 2, "farthest": None, "split": "none"}
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def tokenizer(tmp_path):
    words = {f"w{i}": i for i in range(50)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w7", unk_token="w0"
    )


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def saved(tiny, tokenizer, tmp_path):
    """A folder holding a sparsified model, and the model."""
    model = sparsetrain.sparsify(tiny("llama"), POWER)
    sparsetrain.save(model, tmp_path / "model", tokenizer)
    return tmp_path / "model", model


def edit_record(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["sparsetrain"] = {**config["sparsetrain"], **changes}
    (folder / "config.json").write_text(json.dumps(config))


def test_load_gives_back_the_same_logits(saved, tokens):
    folder, model = saved
    loaded = sparsetrain.load(folder)
    assert torch.equal(loaded(tokens(45)).logits, model(tokens(45)).logits)
    assert loaded.config.sparsetrain == model.config.sparsetrain


def test_save_pretrained_alone_keeps_the_method(family, tiny, tokens, tmp_path):
    model = sparsetrain.sparsify(tiny(family), {**POWER, "dense_layers": []})
    model.save_pretrained(tmp_path)
    assert torch.equal(sparsetrain.load(tmp_path)(tokens(45)).logits, model(tokens(45)).logits)


def test_plain_transformers_loads_the_dense_model(family, tiny, eager, tokens, tmp_path):
    model = tiny(family)
    dense = eager(model)(tokens(45)).logits
    sparsetrain.save(sparsetrain.sparsify(model, {**POWER, "dense_layers": []}), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation != "sparsetrain"
    plain.set_attn_implementation("eager")  # older transformers drop Gemma-2's soft cap under sdpa
    torch.testing.assert_close(plain(tokens(45)).logits, dense, rtol=1e-4, atol=1e-4)


def test_save_writes_what_the_folder_is(saved):
    folder, _ = saved
    about = json.loads((folder / "sparsetrain.json").read_text())
    assert about["attention"] == {**POWER, **AS_PUBLISHED, "replace_sliding_layers": False}
    assert about["version"] == sparsetrain.__version__
    # What PyPI calls 2.13.0 calls itself 2.13.0+cu130.
    assert torch.__version__.startswith(about["versions"]["torch"])
    assert AutoTokenizer.from_pretrained(folder).eos_token == "w7"


def test_save_refuses_a_model_without_a_method(tiny, tmp_path):
    with pytest.raises(ModelError, match="no attention method to save"):
        sparsetrain.save(tiny("llama"), tmp_path)


def test_load_refuses_a_folder_without_a_record(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"records no attention method.*sparsetrain\.sparsify"):
        sparsetrain.load(tmp_path)


def test_load_refuses_a_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r"nothing.*there is no such folder"):
        sparsetrain.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"format": 99, "version": "9.0"}, r"written by sparsetrain 9\.0 \(format 99\).*upgrade"),
        ({"attention": {"method": "powder"}}, "'powder', did you mean power"),
        ({"attention": {"method": "power", "shift": 1}}, "'shift'"),
    ],
)
def test_load_refuses_a_record_it_does_not_understand(record, reason, saved):
    folder, _ = saved
    edit_record(folder, **record)
    with pytest.raises(ModelError, match=reason):
        sparsetrain.load(folder)


def test_the_two_records_of_a_folder_agree(saved):
    folder, _ = saved
    file = folder / "sparsetrain.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "attention": {**about["attention"], "window": 3}}))
    with pytest.raises(
        ModelError, match=r"sparsetrain\.json records attention=.*'window': 3.*, and config\.json beside it"
    ):
        sparsetrain.load(folder)
    file.write_text("{")
    with pytest.raises(ModelError, match=r"sparsetrain\.json is not JSON"):
        sparsetrain.load(folder)
    file.unlink()
    edit_record(folder, attention={"method": "power", "block": 4, "window": 2})
    with pytest.raises(ModelError, match=r"is damaged: attention: the field dense_layers is missing"):
        sparsetrain.load(folder)


def test_load_reads_a_folder_of_before_its_method_had_more_fields(saved):
    folder, model = saved
    attention = {name: value for name, value in model.config.sparsetrain["attention"].items() if name in BEFORE}
    edit_record(folder, attention=attention)
    file = folder / "sparsetrain.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention": attention}))
    found = sparsetrain.load(folder).config.sparsetrain["attention"]
    assert found == model.config.sparsetrain["attention"]
    assert {name: found[name] for name in found.keys() - BEFORE} == AS_PUBLISHED


def test_load_refuses_an_attention_implementation(saved):
    with pytest.raises(ModelError, match="attn_implementation"):
        sparsetrain.load(saved[0], attn_implementation="eager")


def test_load_passes_arguments_to_transformers(saved):
    assert sparsetrain.load(saved[0], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_model_puts_the_recipes_method_over_the_recorded_one(saved):
    model, tokenizer = load_model(ModelSection(path=str(saved[0])), {"method": "full"}, seed=0)
    assert model.config.sparsetrain["attention"]["method"] == "full"
    assert model.dtype == torch.bfloat16
    assert tokenizer.eos_token == "w7"


def test_load_model_builds_an_architecture_from_the_seed(tokenizer_folder):
    section = ModelSection(architecture=ARCHITECTURE, tokenizer=tokenizer_folder, dtype="float32")
    first, again, other = (load_model(section, POWER, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert (first.config.eos_token_id, first.config.bos_token_id) == (7, None)


def test_building_an_architecture_leaves_the_global_generator_alone(tokenizer_folder):
    section = ModelSection(architecture=ARCHITECTURE, tokenizer=tokenizer_folder)
    before = torch.random.get_rng_state()
    load_model(section, POWER, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_config_overrides_change_the_loaded_model(saved):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    section = ModelSection(
        path=str(saved[0]), config_overrides={"max_position_embeddings": 4096, "rope_parameters": rope}
    )
    model, _ = load_model(section, POWER, seed=0)
    assert model.config.max_position_embeddings == 4096
    plain, _ = load_model(ModelSection(path=str(saved[0])), POWER, seed=0)
    assert not torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"path": "/no/such/folder"}, r"model\.path='/no/such/folder': there is no such folder"),
        ({"path": "sparsetrain:huge"}, "no such model ships with sparsetrain"),
        ({"path": "SAVED", "config_overrides": {"rms_nrom_eps": 1e-6}}, "did you mean rms_norm_eps"),
        ({"path": "SAVED", "config_overrides": {"vocab_size": "many"}}, r"model\.config_overrides\.vocab_size='many'"),
        ({"path": "SAVED", "tokenizer": "./missing"}, r"model\.tokenizer='\./missing': there is no such folder"),
        ({"architecture": {**ARCHITECTURE, "model_type": "lama"}}, "did you mean llama"),
        ({"architecture": {**ARCHITECTURE, "hiden_size": 8}}, "did you mean hidden_size"),
        ({"architecture": {**ARCHITECTURE, "vocab_size": 40}}, "50 token ids but the model's embedding only 40 rows"),
    ],
)
def test_load_model_explains_what_does_not_fit(section, reason, saved, tokenizer_folder):
    if section.get("path") == "SAVED":
        section = {**section, "path": str(saved[0])}
    if "architecture" in section:
        section = {**section, "tokenizer": tokenizer_folder}
    with pytest.raises(ModelError, match=reason):
        load_model(ModelSection(**section), POWER, seed=0)


def test_a_hub_model_that_cannot_be_reached_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hf download sparsetrain-tests/absent"):
        load_model(ModelSection(path="sparsetrain-tests/absent"), POWER, seed=0)


def test_a_checkpoint_with_missing_weights_is_refused(saved):
    from safetensors.torch import load_file, save_file

    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*model\.layers\.1\.self_attn\.o_proj\.weight"):
        load_model(ModelSection(path=str(folder)), POWER, seed=0)


def test_a_folder_without_a_tokenizer_is_refused(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.path \(tokenizer\)"):
        load_model(ModelSection(path=str(tmp_path)), POWER, seed=0)
