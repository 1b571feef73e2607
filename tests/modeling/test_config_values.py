"""What a recipe or a file says of a model is taken as it is meant, or refused with its name, value and reason."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.errors import ModelError
from sparsetrain.modeling import load_config, load_model
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.weights import check_headers
from sparsetrain.recipe.schema import ModelSection

TINY = "sparsetrain:tiny"
SHAPE = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def overridden(**overrides):
    return load_config(ModelSection(path=TINY, config_overrides=overrides))


def built(**fields):
    return load_config(ModelSection(architecture={**SHAPE, **fields}, tokenizer=TINY))


@pytest.mark.parametrize(
    "spelling", [{"rope_parameters": {"rope_type": "linear"}}, {"rope_scaling": {"type": "linear"}}]
)
def test_rotary_parameters_are_merged_in_either_spelling(spelling):
    name, given = next(iter(spelling.items()))
    parameters = overridden(**{name: {**given, "factor": 4.0}}).rope_parameters
    assert parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0}


def test_theta_alone_leaves_the_rest():
    assert overridden(rope_theta=5e5).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_yarn_scales_the_positions_that_the_model_was_trained_for():
    config = overridden(max_position_embeddings=2048, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert config.max_position_embeddings == 2048
    assert config.rope_parameters["original_max_position_embeddings"] == 512


def test_rotary_parameters_by_kind_of_layer_are_merged_by_kind():
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    shape = {"model_type": "gemma3_text", "num_hidden_layers": 6}
    section = {"architecture": {**shape, "rope_parameters": kinds}, "tokenizer": TINY}
    config = load_config(
        ModelSection(**section, config_overrides={"rope_parameters": {"full_attention": {"factor": 4.0}}})
    )
    assert config.rope_parameters == {**kinds, "full_attention": {**kinds["full_attention"], "factor": 4.0}}
    with pytest.raises(ModelError, match=r"rope_parameters\.factor.*full_attention or sliding_attention"):
        load_config(ModelSection(**section, config_overrides={"rope_parameters": {"factor": 4.0}}))


def test_what_follows_from_an_override_follows():
    """The width of heads is derived where the files do not give it, so it must be that of the new number of heads."""
    section = ModelSection(architecture=SHAPE, tokenizer=TINY, config_overrides={"num_attention_heads": 4})
    assert load_config(section).head_dim == 8


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"rope_parameters": {"factor": 4.0}}, r"overrides\.rope_parameters: .*factor=4\.0 has no effect.*default"),
        ({"rope_parameters": {"rope_type": "yarm"}}, r"overrides\.rope_parameters: .*'yarm'.*did you mean yarn"),
        ({"rope_parameters": {"rope_type": ["x"]}}, r"overrides\.rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"overrides\.rope_parameters=.*Missing required keys.*factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, r"factor='4' is not a number of at least 1"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32}},
            r"beta_slow=32 is not below",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1}},
            r"attention_factor=-1 is not",
        ),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            r"low_freq_factor=4\.0 is not below high_freq_factor=4\.0",
        ),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, r"long_factor=\[1\.0\] is not a list of numbers"),
        (
            {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 15 + [0]}},
            r"short_factor=.* is not a list of numbers",
        ),
        ({"rope_parameters": {"factr": 4.0}}, "'factr' is not a parameter of rotary positions; did you mean factor"),
        ({"rope_parameters": []}, r"rope_parameters=\[\]: .* must be a mapping"),
        ({"rope_theta": 0}, r"overrides\.rope_theta: .*rope_theta=0 is not a number above 0"),
        ({"partial_rotary_factor": 0.5}, "LlamaConfig has no such field"),
        ({"hidden_act": "silly"}, r"overrides\.hidden_act: hidden_act='silly'.*did you mean silu"),
        ({"hidden_size": "192"}, r"overrides\.hidden_size='192': .*expected int, got str"),
        ({"num_attention_heads": 0}, r"overrides\.num_attention_heads=0: ZeroDivisionError"),
        ({"num_hidden_layers": 10**9}, r"overrides\.num_hidden_layers: .*not between 1 and 10000"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide num_attention_heads=6"),
        ({"head_dim": -1}, r"overrides\.head_dim"),
        ({"rms_norm_eps": float("nan")}, r"overrides\.rms_norm_eps: rms_norm_eps is not a number"),
        ({"attention_dropout": -1}, r"attention_dropout=-1 is a probability"),
        ({"eos_token_id": []}, r"eos_token_id=\[\] names no token"),
        ({"model_type": "qwen3"}, r"overrides\.model_type cannot be set here"),
        ({"dtype": "float32"}, r"overrides\.dtype cannot be set here: set model\.dtype"),
        ({"to_dict": 1}, "LlamaConfig has no such field"),
        ({"_attn_implementation": "org/kernel"}, "LlamaConfig has no such field"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_override_that_cannot_be_meant_is_refused_by_name(overrides, reason):
    with pytest.raises(ModelError, match=reason):
        overridden(**overrides)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": 33}, r"model\.architecture\.hidden_size=33: .*not a multiple"),
        ({"hidden_act": 3}, r"model\.architecture\.hidden_act=3: .*expected str, got int"),
        ({"rope_scaling": {"type": "yarn"}}, r"model\.architecture\.rope_scaling=.*factor"),
        ({"rope_parameters": {"thta": 1.0}}, "'thta' is not a parameter of rotary positions"),
        ({"torch_dtype": "float32"}, r"set model\.dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_architecture_that_cannot_be_meant_is_refused_by_name(fields, reason):
    with pytest.raises(ModelError, match=reason):
        built(**fields)


def test_a_part_of_a_config_takes_no_unknown_field():
    config = {"text_config": {"hiden_size": 32}}
    with pytest.raises(ModelError, match=r"architecture\.text_config\.hiden_size.*did you mean hidden_size"):
        load_config(ModelSection(architecture={"model_type": "gemma3", **config}, tokenizer=TINY))


def test_random_weights_beyond_the_memory_of_the_host_are_refused():
    section = ModelSection(architecture={**SHAPE, "vocab_size": 10**12}, tokenizer=TINY)
    with pytest.raises(ModelError, match=r"model\.architecture: .* random weights take .* GiB"):
        load_model(section, {"method": "full"}, seed=0)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(resolve(TINY, "path"), tmp_path / "model")
    return tmp_path / "model"


def change(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def loads(folder):
    """Both doors refuse alike."""
    with pytest.raises(ModelError) as by_load:
        sparsetrain.load(folder)
    with pytest.raises(ModelError) as by_recipe:
        load_model(ModelSection(path=str(folder)), {"method": "full"}, seed=0)
    first, second = (str(found.value).removeprefix("model.") for found in (by_load, by_recipe))
    assert first == second
    return first


def test_weights_that_are_missing_are_not_made_up(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks 1 weights that LlamaForCausalLM needs: model.layers.1.mlp.up_proj.weight" in loads(folder)


def test_weights_of_another_shape_are_named_with_both_shapes(folder):
    change(folder, "config.json", intermediate_size=48)
    assert "model.layers.0.mlp.down_proj.weight is [192, 512] instead of [192, 48]" in loads(folder)


def test_weights_that_are_not_finite_are_named(folder):
    change_weights(folder, lambda weights: weights["model.norm.weight"].view(-1)[:1].fill_(float("nan")))
    assert "not finite (NaN or infinity): model.norm.weight" in loads(folder)


def test_layers_that_the_config_does_not_have_are_named(folder):
    change(folder, "config.json", num_hidden_layers=5)
    assert "weights of layers that LlamaForCausalLM with num_hidden_layers=5 does not have" in loads(folder)
    asked_for = ModelSection(path=TINY, config_overrides={"num_hidden_layers": 5})
    assert load_model(asked_for, {"method": "full"}, seed=0)[0].config.num_hidden_layers == 5


def test_a_head_beside_tied_embeddings_is_refused(folder):
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(2048, 192).bfloat16()}))
    assert "tie_word_embeddings=true" in loads(folder)
    with pytest.raises(ModelError, match="tie_word_embeddings=true"):  # as validate asks, without loading
        check_headers(str(folder), "model.path", LlamaForCausalLM, AutoConfig.from_pretrained(folder))
    change(folder, "config.json", tie_word_embeddings=False)
    check_headers(str(folder), "model.path", LlamaForCausalLM, AutoConfig.from_pretrained(folder))
    assert sparsetrain.load(folder).lm_head.weight.float().mean() == 1


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("config.json", {"model_type": "lama"}, "model_type='lama' is not a family .*did you mean llama"),
        ("config.json", {"rms_norm_eps": None}, "config.json: rms_norm_eps=None: .*expected float"),
        ("config.json", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not used by model_type=llama"),
        ("config.json", {"sliding_window": 64}, "config.json: sliding_window: sliding_window=64 is not used"),
        ("config.json", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not used"),
        ("config.json", {"dtype": "float31"}, "config.json: dtype='float31'"),
        (
            "config.json",
            {"text_config": {"vocab_size": 7}},
            "config.json: text_config: text_config=.*has no such sub-config; leave it out",
        ),
        ("config.json", {"decoder": 5}, "config.json: decoder: decoder=5: .*has no such sub-config; leave it out"),
        ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: eos_token_id='x'"),
        ("generation_config.json", {"top_p": 7}, "generation_config.json: top_p=7"),
    ],
)
def test_a_value_in_a_file_is_refused_with_the_file_and_the_reason(file, values, reason, folder):
    change(folder, file, **values)
    with pytest.raises(ModelError, match=reason):
        raise ModelError(loads(folder))


def test_fields_of_other_families_that_ask_for_nothing_pass(folder):
    change(folder, "config.json", partial_rotary_factor=1.0, sliding_window=None, logit_scale=1, alibi=False)
    sparsetrain.load(folder)


def test_a_family_at_its_default_size_is_never_built_by_the_way():
    with pytest.raises(ModelError, match=r"gives no size, .*num_hidden_layers=32, hidden_size=4096"):
        load_config(ModelSection(architecture={"model_type": "llama"}, tokenizer=TINY))
    section = ModelSection(architecture={"model_type": "gpt2"}, tokenizer=TINY, config_overrides={"n_layer": 2})
    assert load_config(section).num_hidden_layers == 2


def test_a_generation_config_that_cannot_be_read_is_not_passed_over(folder):
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json is not JSON" in loads(folder)


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("tokenizer_config.json", {"model_max_length": "many"}, "model_max_length='many'"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, r"tokenizer\.json cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_encode_is_refused_with_its_file(file, values, reason, folder):
    change(folder, file, **values)
    with pytest.raises(ModelError, match=reason):
        load_model(ModelSection(path=str(folder)), {"method": "full"}, seed=0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_and_a_lack_of_memory_pass_as_they_are(stop, monkeypatch):
    def stopped(*args, **kwargs):
        raise stop

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stopped)
    with pytest.raises(stop):
        sparsetrain.load(TINY)
    monkeypatch.setattr(AutoConfig, "from_pretrained", stopped)
    with pytest.raises(stop):
        load_config(ModelSection(path=TINY))


@pytest.fixture
def call(folder, tmp_path, monkeypatch, capsys):
    """``call(command, *overrides)``: exit code and stderr of a command on a recipe of the folder."""
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": {"path": "model"},
        "attention": {"method": "power", "block": 16, "window": 2, "sinks": 1},
        "data": {"sources": [{"synthetic": "passkey"}]},
        "sequence": {"length": 512},
        "train": {"steps": 1, "lr": 1e-3},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    def run(command, *overrides):
        code = main([*command.split(), "r.yaml", *overrides])
        captured = capsys.readouterr()
        return code, " ".join((captured.err + captured.out).split())

    return run


CANNOT_START = [
    (["sequence.length=1024"], "1024 is beyond the model's max_position_embeddings=512"),
    (["model.config_overrides={hidden_act: silly}"], "hidden_act='silly'"),
    (["lora={targets: [no_proj]}"], "no_proj"),
    (["model.config_overrides={num_attention_heads: 7}"], "num_"),
]


@pytest.mark.parametrize("command", ["recipe validate", "plan"])
def test_commands_refuse_what_could_not_start(command, call, folder):
    assert call(command)[0] == 0
    for overrides, reason in CANNOT_START:
        code, said = call(command, *overrides)
        assert code == 2
        assert reason in said
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    code, said = call(command)
    assert code == 2
    assert "model.path (tokenizer)" in said


def untied(folder):
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(2048, 192).bfloat16()}))


def same_head(folder):
    copy = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": copy}))


def packed(**fields):
    return lambda folder: change(folder, "config.json", quantization_config=fields)


@pytest.mark.parametrize("command", ["recipe validate", "plan", "doctor"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (untied, "tie_word_embeddings=true"),
        (same_head, None),
        (lambda folder: change(folder, "config.json", partial_rotary_factor=0.5), "is not used by model_type=llama"),
        (packed(quant_method="fp8"), "hold unpacked ones, without scales; remove quantization_config from"),
        (packed(quant_method="bitsandbytes", load_in_4bit=True), "pip install -U bitsandbytes"),
    ],
)
def test_commands_refuse_weights_that_the_run_would_refuse(command, damage, reason, call, folder):
    if "bitsandbytes" in str(reason) and find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    damage(folder)
    code, said = call(command)
    if reason is None:
        assert "tie_word_embeddings" not in said
    else:
        assert code == 2
        assert reason in said


def test_doctor_names_the_fault_of_a_model(call, folder):
    change(folder, "config.json", hidden_act="silly")
    code, said = call("doctor")
    assert code == 2
    assert "hidden_act='silly'" in said
    assert "the check itself failed" not in said
