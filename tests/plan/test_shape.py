"""Where the shape of a model comes from, and the sizes of devices."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sparsetrain.cli import main
from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.plan.command import make_plan
from sparsetrain.plan.devices import find_device, parse_memory
from sparsetrain.plan.shape import KNOWN_SHAPES, find_shape, shape_of_config
from sparsetrain.recipe import load_recipe

GIB = 2**30


def test_memory_is_read_as_it_is_printed_on_the_card():
    assert parse_memory("80GB") == parse_memory("80") == 80e9
    assert parse_memory("79.5 GiB") == 79.5 * GIB
    for wrong in ("much", "0GB", "-1"):
        with pytest.raises(RecipeError, match="80GB"):
            parse_memory(wrong)
    with pytest.raises(RecipeError, match=r"h100x.*choose from h100"):
        find_device("h100x")


def test_a_shape_is_found_where_the_config_is(tmp_path, monkeypatch):
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def section(path, **fields):
        return load_recipe("qwen3-0.6b-power-32k").recipe.model.model_copy(
            update={"path": path, "config_overrides": {}, **fields}
        )

    from_folder = find_shape(section(str(tmp_path)))
    assert (from_folder.layers, from_folder.qk_norm, from_folder.tied) == (4, True, False)
    assert find_shape(section(str(tmp_path), config_overrides={"num_hidden_layers": 2})).layers == 2
    assert find_shape(section("somebody/unknown"), tmp_path / "config.json") == from_folder
    with pytest.raises(ModelError, match=r"somebody/unknown.*--config FILE.*hf download"):
        find_shape(section("somebody/unknown"))
    snapshot = tmp_path / "hub" / "models--somebody--unknown" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_shape(section("somebody/unknown")) == from_folder


def test_ranks_are_not_told_to_share_rows_where_a_run_would_refuse_it(tmp_path):
    shape = KNOWN_SHAPES["meta-llama/Llama-3.2-1B"].as_config()
    name, options = "llama-3.2-1b-power-lora-128k", {"config": tmp_path / "config.json", "gpus": 8, "memory": "15GB"}
    combinations = []
    for rope in ({"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}):
        options["config"].write_text(json.dumps({**shape, "rope_parameters": rope}))
        combinations.append(" ".join(make_plan(name, **options).suggestion.combination))
    with pytest.raises(RecipeError, match=r"sequence.parallel: the rotary embedding of the model \(dynamic\)"):
        make_plan(name, ["sequence.parallel=2"], **options)
    assert ["parallel" in combination for combination in combinations] == [True, False]


@pytest.mark.parametrize("path", KNOWN_SHAPES)
def test_a_known_shape_takes_overrides_too(path):
    section = load_recipe("qwen3-0.6b-power-32k").recipe.model.model_copy(update={"path": path})
    assert find_shape(section) == KNOWN_SHAPES[path]
    fewer = section.model_copy(update={"config_overrides": {"num_hidden_layers": 3}})
    assert find_shape(fewer) == replace(KNOWN_SHAPES[path], layers=3)


def test_what_a_plan_cannot_count_is_refused():
    whole = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), 8)
    with pytest.raises(ModelError, match=r"no intermediate_size.*gpt2"):
        shape_of_config({**whole, "model_type": "gpt2"}, "there")
    with pytest.raises(ModelError, match=r"there: model_type='bert' cannot be planned; llama, mistral, .* can"):
        shape_of_config({**whole, "intermediate_size": 8, "model_type": "bert"}, "there")
    with pytest.raises(ModelError, match="experts"):
        shape_of_config({**whole, "intermediate_size": 8, "num_experts": 4, "model_type": "qwen3_moe"}, "there")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not a positive whole number"),
        ({"num_attention_heads": -4}, "num_attention_heads=-4 is not"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2' is not"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is not"),
        ({"hidden_size": -256}, "hidden_size=-256 is not"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is not"),
        ({"vocab_size": 1e5}, "vocab_size=100000.0 is not"),
        ({"head_dim": "x"}, "head_dim='x' is not"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=8"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=256"),
        ({"model_type": ["llama"]}, "model_type=['llama'] cannot be planned"),
        ({"model_type": None}, "model_type=None cannot be planned"),
    ],
)
def test_a_malformed_config_is_explained(fields, fault, tmp_path, capsys):
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 512,
        "vocab_size": 1000,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert main(["plan", "quickstart", "--config", str(file)]) == 0
    file.write_text(json.dumps(config | fields))
    assert main(["plan", "quickstart", "--config", str(file)]) == 2
    assert f"error: {file}: {fault}" in capsys.readouterr().err


def test_an_empty_config_is_not_taken_for_none(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(ModelError, match=r"config.json: its config has no hidden_size, num_hidden_layers"):
        make_plan("qwen3-0.6b-power-32k", config=file)
    file.write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not JSON"):
        make_plan("qwen3-0.6b-power-32k", [f"model.path={tmp_path}"])


def test_overrides_reach_the_text_part_of_a_config_and_are_named_where_they_are_wrong():
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 1000,
    }
    config = {"model_type": "gemma3", "text_config": text}
    assert shape_of_config(config, "there", {"num_hidden_layers": 2}).layers == 2
    with pytest.raises(ModelError, match=r"^model.config_overrides: num_hidden_layers=0 is not"):
        shape_of_config(config, "there", {"num_hidden_layers": 0})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-32B", 32_762_123_264),
    ],
)
def test_the_table_of_shapes_gives_the_parameters_the_hub_states(name, params, setting):
    assert setting(shape=KNOWN_SHAPES[name]).parameters.total == params
