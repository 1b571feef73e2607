from __future__ import annotations

import re

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import SCHEMA_VERSION, dump_recipe, load_recipe, other_names
from sparsetrain.recipe.problems import field_paths
from sparsetrain.recipe.schema import Recipe


def test_name_and_output_default_to_the_file(load, minimal):
    recipe = load(minimal).recipe
    assert recipe.name == "run"
    assert recipe.output == "runs/run"
    assert load(minimal, "name=other").recipe.output == "runs/other"
    assert load(minimal, "output=/data/here").recipe.output == "/data/here"


@pytest.mark.parametrize(
    ("text", "value"), [("2e-5", 2e-5), ("2E-5", 2e-5), ("1e-3", 1e-3), ("3", 3.0), ("1_0.5", 10.5)]
)
def test_numbers_in_every_usual_spelling_are_numbers(load, minimal, text, value):
    lr = load(minimal.replace("lr: 2e-5", f"lr: {text}")).recipe.train.lr
    assert isinstance(lr, float)
    assert lr == value


def test_a_whole_number_may_be_written_with_an_exponent_or_underscores(load, minimal):
    assert load(minimal.replace("steps: 30", "tokens: 1e9")).recipe.train.tokens == 1_000_000_000
    assert load(minimal.replace("steps: 30", "tokens: 1_000_000")).recipe.train.tokens == 1_000_000


@pytest.mark.parametrize("text", ["on", "no", "2024-01-01", "1:30", "010", "1.2.3"])
def test_text_that_older_yaml_reads_as_something_else_stays_text(load, minimal, text):
    assert load(minimal.replace("some/model}", f"some/model, revision: {text}}}")).recipe.model.revision == text


def test_unknown_key_names_the_nearest_and_the_line(refuse, minimal):
    message = refuse(minimal.replace("steps: 30", "steps: 30\n  max_grad_nrom: 2.0"))
    assert "run.yaml:9: train.max_grad_nrom: unknown key; did you mean train.max_grad_norm?" in message


def test_unknown_key_in_the_wrong_section_names_the_right_one(refuse, minimal):
    assert "train.length: unknown key here; did you mean sequence.length?" in refuse(minimal + "  length: 3\n")
    assert "run.yaml:10: lr: unknown key here; did you mean train.lr?" in refuse(minimal + "lr: 3\n")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("learning_rate: 1", "train.lr"),
        ("train: {max_steps: 3}", "train.steps"),
        ("model: {name: x}", "model.path"),
        ("lora: {r: 8}", "lora.rank"),
        ("train: {gradient_accumulation_steps: 4}", "train.global_batch_sequences (accumulation follows from it, "),
        ("data: {sources: [{path: a.json, type: alpaca}]}", "data.sources.0.form (auto finds it"),
    ],
)
def test_a_key_of_other_trainers_is_answered_by_what_it_is_called_here(refuse, key, ours):
    assert f"unknown key; did you mean {ours}" in refuse(f"base: quickstart\n{key}\n")


def test_names_of_other_trainers_lead_to_keys_that_there_are():
    there_are = {".".join(path) for path in field_paths(Recipe)}
    assert {*other_names._NAMES, *(f"data.sources.{name}" for name in other_names._SOURCE_NAMES)} <= there_are
    assert not {name for name in other_names._BY_NAME if "." not in name} & set(Recipe.model_fields)


def test_unknown_key_without_a_likeness_lists_what_there_is(refuse, minimal):
    message = refuse(minimal.replace("{length: 128}", "{length: 128, zzz: 1}"))
    assert "sequence.zzz: unknown key; sequence has length, packing" in message


def test_unknown_key_of_a_method_is_answered_by_that_method(refuse, minimal):
    assert "attention.sink: unknown key; did you mean attention.sinks?" in refuse(
        minimal.replace("window: 3", "sink: 3")
    )
    assert "attention.stride: unknown key" in refuse(minimal.replace("window: 3", "stride: 3"))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps: 30", "steps: many", "train.steps: expected a whole number, got 'many'"),
        ("steps: 30", 'steps: "30"', "train.steps: expected a whole number, got '30'; without quotes"),
        ("steps: 30", "steps: 1.5", "train.steps: expected a whole number, got 1.5"),
        ("steps: 30", "steps: true", "train.steps: expected a whole number, got true"),
        ("steps: 30", "steps: -3", "train.steps: expected a number above 0, got -3"),
        ("length: 128", "length: -128", "sequence.length: expected a number above 0, got -128"),
        ("length: 128", "length: 128, packing: yes", "sequence.packing: expected true or false, got 'yes'"),
        ("length: 128", "length:", "sequence.length: expected a whole number, got nothing (null)"),
        ("lr: 2e-5", "lr: fast", "train.lr: expected a number, got 'fast'"),
        ("lr: 2e-5", "lr: 0", "train.lr: expected a number above 0, got 0"),
        ("lr: 2e-5", "lr: 1e999", "train.lr: expected a finite number, got inf"),
        ("lr: 2e-5", "lr: [1]", "train.lr: expected a number, got a list of 1"),
        (
            "lr: 2e-5",
            "lr: 1\n  schedule: cosin",
            "train.schedule: expected 'constant', 'linear', 'cosine' or 'wsd', got 'cosin'",
        ),
        (
            "lr: 2e-5",
            "lr: 1\n  optimizer: muon",
            "train.optimizer: expected a mapping of settings, got 'muon'; train.optimizer.name=muon chooses one",
        ),
        (
            "lr: 2e-5",
            "lr: 1\neval: off",
            "eval: expected a mapping of settings, got 'off'; eval: {tasks: []} measures nothing",
        ),
        ("lr: 2e-5", "lr: 1\nwandb: false", "got false; wandb: {mode: disabled} switches it off"),
        ("lr: 2e-5", "lr: 1\n  optimizer: {betas: [0.9]}", "train.optimizer.betas.1: is required"),
        (
            "some/model}",
            "some/model, revision: 1234567}",
            "model.revision: expected text, got 1234567; put it in quotes",
        ),
        (
            "window: 3",
            "window: 3, dense_layers: all",
            "attention.dense_layers: expected a list or a mapping of settings",
        ),
        ("window: 3", "window: 3, dense_layers: {count: 2}", "attention.dense_layers.every: is required"),
        ("method: power", "method: powr", "attention.method: there is no 'powr'; did you mean power?"),
        ("method: power, ", "", "attention: needs 'method'"),
        ("train:\n  steps: 30\n  lr: 2e-5\n", "", "train: is required"),
        ("    - path: corpus.jsonl\n", "    []\n", "data.sources: expected a list of at least 1, got a list of 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(refuse, minimal, old, new, expected):
    assert old in minimal
    message = refuse(minimal.replace(old, new))
    assert expected in message
    assert message.count("\n") == 1, message
    assert re.search(r"run\.yaml:\d+: ", message)


def test_all_problems_are_listed_in_the_order_of_the_file(refuse, minimal):
    message = refuse(
        minimal.replace("some/model", "some/model, dtyp: float32").replace("lr: 2e-5", "lr: fast").replace("128", "-1")
    )
    assert message.splitlines()[0].endswith("has 3 problems:")
    assert [line.split(":")[1] for line in message.splitlines()[1:]] == ["1", "6", "9"]


def test_duplicate_key_is_refused_with_both_lines(refuse, minimal):
    message = refuse(minimal + "  lr: 1e-4\n")
    assert "run.yaml:10: train.lr: given twice in one section, first on line 9" in message


def test_anchors_and_merge_keys_work(load, minimal):
    text = minimal.replace("    - path: corpus.jsonl", "    - &a {path: x.txt, weight: 3}\n    - {<<: *a, path: y.txt}")
    assert [(s.path, s.weight) for s in load(text).recipe.data.sources] == [("x.txt", 3.0), ("y.txt", 3.0)]


def test_an_alias_inside_itself_is_refused(refuse, minimal):
    assert "an alias that contains itself" in refuse(minimal.replace("{path: some/model}", "&m {config_overrides: *m}"))


def test_a_key_that_is_a_list_is_refused(refuse, minimal):
    assert "run.yaml:10: a key must be plain text" in refuse(minimal + "? [a, b]\n: 1\n")


def test_endless_nesting_is_refused(refuse):
    assert "nested too deeply" in refuse("[" * 5000 + "]" * 5000)


@pytest.mark.parametrize(
    ("method", "key", "owners"),
    [
        ("power", "stride", "stride has"),
        ("full", "window", "power, sliding, stride, dilated, ruler and sparsek have"),
    ],
)
def test_a_setting_of_another_method_is_told_from_a_misspelt_one(refuse, minimal, method, key, owners):
    message = refuse(minimal, f"attention.method={method}", f"attention.{key}=3")
    assert f"attention.{key}: unknown key: method {method} has no {key}, but {owners}" in message


@pytest.mark.parametrize("text_config", ["null", "3"])
def test_a_config_whose_text_part_is_no_mapping_is_left_to_the_model(load, minimal, text_config):
    model = f"{{architecture: {{model_type: llama, text_config: {text_config}}}, tokenizer: t}}"
    assert load(minimal, f"model={model}").recipe.model.architecture is not None


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "!custom {path: x}"])
def test_yaml_tags_are_refused(refuse, minimal, text):
    assert "run.yaml:1" in refuse(minimal.replace("{path: some/model}", text))


def test_broken_yaml_names_the_line(refuse, minimal):
    assert "run.yaml:2: not valid YAML" in refuse("model: {path: x}\n\tattention: 3\n")


def test_a_recipe_from_a_newer_version_is_refused_before_anything_else(refuse):
    message = refuse(f"version: {SCHEMA_VERSION + 1}\nbase: nowhere\nsomething: new\n")
    assert f"run.yaml:1: the recipe is written for schema version {SCHEMA_VERSION + 1}" in message
    assert "upgrade" in message
    assert "something" not in message


def test_a_recipe_without_most_sections_is_told_to_name_a_base(refuse, minimal):
    assert "such as base: qwen3-0.6b-power-32k" in refuse("base_model: some/model\nlearning_rate: 2e-5\n")
    assert "such as base:" not in refuse(minimal + "surplus: 1\n")


@pytest.mark.parametrize(
    ("text", "expected"), [("", "is empty"), ("# only\n", "is empty"), ("- a\n", "not a list"), ("word", "not a str")]
)
def test_a_file_that_is_no_recipe_is_refused(refuse, text, expected):
    assert expected in refuse(text)


def test_unreadable_files_are_refused(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path, expected in (
        (binary, "not a text file"),
        (tmp_path, "is a folder"),
        (tmp_path / "gone.yaml", "there is no recipe"),
        ("qwen3-8b-power-128", "did you mean the shipped recipe qwen3-8b-power-128k?"),
    ):
        with pytest.raises(RecipeError, match=re.escape(expected)):
            load_recipe(path)


def test_environment_variables_fill_in_values_of_any_type(load, minimal, monkeypatch):
    monkeypatch.setenv("CORPUS", "/data/corpus")
    text = minimal.replace("corpus.jsonl", "${env:CORPUS}/${env:SPLIT:train}.jsonl")
    text = text.replace("steps: 30", "steps: ${env:STEPS:12}")
    recipe = load(text).recipe
    assert recipe.data.sources[0].path == "/data/corpus/train.jsonl"
    assert recipe.train.steps == 12
    monkeypatch.setenv("STEPS", "7")
    assert load(text).recipe.train.steps == 7


def test_a_quoted_environment_variable_stays_text(load, minimal, monkeypatch):
    monkeypatch.setenv("REVISION", "1234567")
    text = minimal.replace("some/model}", 'some/model, revision: "${env:REVISION}"}')
    assert load(text).recipe.model.revision == "1234567"


def test_a_missing_environment_variable_names_itself_and_the_line(refuse, load, minimal, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    text = minimal.replace("corpus.jsonl", "${env:NOWHERE}/x.jsonl")
    message = refuse(text)
    assert "run.yaml:5: data.sources.0.path: the environment variable NOWHERE is not set" in message
    assert message.count("\n") == 1
    assert load(text, "data.sources.0.path=x.jsonl").recipe.data.sources[0].path == "x.jsonl"


def test_other_interpolation_is_refused(refuse, minimal):
    assert "${HOME} is not known; write ${env:NAME}" in refuse(minimal.replace("corpus.jsonl", "${HOME}/x"))


def test_a_dumped_recipe_reads_back_as_the_same(load, minimal):
    overrides = (
        'name="2e-5"',
        'model.revision="1234567"',
        "model.config_overrides={rope_theta: 1000000.0, big: 1.0e+17, note: 'on', none: null, quoted: '1e9'}",
        "model.config_overrides.deep={a: [1, [b, {c: 2}]]}",
        "train.optimizer.betas=[0.8,0.99]",
        "train.max_grad_norm=null",
        "attention.dense_layers={count: 2, every: 7}",
        "data.sources.0.name='yes: #no'",
        "wandb.tags=['true', 'x=y', 'ünïcode']",
    )
    recipe = load(minimal, *overrides).recipe
    text = dump_recipe(recipe)
    assert load(text).recipe == recipe
    assert dump_recipe(load(text).recipe) == text
    assert isinstance(load(text).recipe.model.config_overrides["rope_theta"], float)


def test_resolved_holds_every_default(load, minimal):
    resolved = load(minimal).resolved
    assert resolved["train"]["max_grad_norm"] == 1.0
    assert resolved["attention"]["sinks"] == 1
    assert resolved["checkpoint"]["keep_last"] == 2
