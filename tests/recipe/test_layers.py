"""Of what excludes one another the upper layer's stays, be it a file over its base or the command line over a file."""

from __future__ import annotations

import json

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import load_recipe

PARENT = """\
model: {path: some/model, revision: abc, trust_remote_code: true, config_overrides: {rope_theta: 1e6}}
attention: {method: power, block: 16, window: 3, dense_layers: [0]}
data: {sources: [{path: corpus.jsonl, form: text, text_field: body, weight: 3}]}
sequence: {length: 128}
train: {tokens: 100_000_000, global_batch_tokens: 256, lr: 2e-5}
lora: {rank: 4}
eval:
  tasks:
    - {task: perplexity, lengths: [64], source: {path: some/set, split: validation, streaming: true}}
    - {task: recall, source: {synthetic: recall, lengths: [128], keys: 2}}
"""


@pytest.fixture(params=["file", "overrides"])
def lay(request, write):
    """Lay settings over PARENT, as a file with this base or as overrides of the command line."""

    def over(settings: dict[str, object], parent: str = PARENT):
        file = write("parent.yaml", parent)
        if request.param == "overrides":
            return load_recipe(file, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        tree: dict = {"base": "parent"}
        for key, value in settings.items():
            section = tree
            *above, last = key.split(".")
            for part in above:
                section = section.setdefault(part, {})
            section[last] = value
        if "eval" in tree:
            tree["eval"]["tasks"] = [{"task": name, **given} for name, given in tree["eval"]["tasks"].items()]
        return load_recipe(write("child.yaml", json.dumps(tree)))

    return over


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({"train.steps": 5}, "train.tokens=100000000"),
        ({"train.epochs": 2.0}, "train.tokens=100000000"),
        ({"train.global_batch_sequences": 4}, "train.global_batch_tokens=256"),
        ({"train.steps": 5, "train.tokens": None}, None),
    ],
)
def test_one_of_several_settings_takes_the_place_of_the_others(lay, settings, gone):
    loaded = lay(settings)
    for key, value in settings.items():
        assert getattr(loaded.recipe.train, key.removeprefix("train.")) == value
    assert [note for note in loaded.notes if "replaces" in note] == ([] if gone is None else loaded.notes[:1])
    assert gone is None or f"replaces {gone} (" in loaded.notes[0]


def test_two_of_them_in_one_layer_are_a_contradiction(lay):
    with pytest.raises(RecipeError, match=r"train\.steps and train\.tokens are given"):
        lay({"train.steps": 5, "train.tokens": 1000})


def test_a_source_takes_the_place_of_a_source(lay):
    loaded = lay({"eval.tasks.perplexity.source.path": "x.txt"})
    source = loaded.recipe.eval.by_name["perplexity"].source
    assert (source.path, source.split, source.streaming) == ("x.txt", "train", False)
    assert any("split=validation" in note and "streaming=True" in note for note in loaded.notes)
    loaded = lay({"eval.tasks.recall.source.synthetic": "multikey", "eval.tasks.recall.source.lengths": [64]})
    source = loaded.recipe.eval.by_name["recall"].source
    assert (source.lengths, source.keys) == ([64], 4)


def test_a_setting_of_the_same_source_is_laid_over_it(lay):
    for settings in ({}, {"eval.tasks.perplexity.source.path": "some/set"}):
        source = (
            lay({**settings, "eval.tasks.perplexity.source.split": "test"}).recipe.eval.by_name["perplexity"].source
        )
        assert (source.path, source.split, source.streaming) == ("some/set", "test", True)


def test_a_source_of_the_mixture_keeps_its_weight(write):
    loaded = load_recipe(write("parent.yaml", PARENT), ["data.sources.0.path=new.jsonl", "data.sources.0.subset=en"])
    (source,) = loaded.recipe.data.sources
    assert (source.path, source.form, source.text_field, source.subset, source.weight) == (
        "new.jsonl",
        "auto",
        "text",
        "en",
        3.0,
    )


def test_another_model_is_not_trusted_and_has_its_own_revision(lay):
    loaded = lay({"model.path": "other/model"})
    model = loaded.recipe.model
    assert (model.path, model.revision, model.trust_remote_code) == ("other/model", None, False)
    assert model.config_overrides == {"rope_theta": 1e6}
    assert "model.revision=abc" in loaded.notes[0]
    same = lay({"model.path": "some/model"})
    assert same.recipe.model.revision == "abc"
    assert not any("config_overrides" in note for note in same.notes)


def test_changes_to_the_config_stay_with_another_model_with_a_note_until_null_drops_them(lay):
    def kept(**settings):
        loaded = lay(
            {"model.path": "other/model"} | {f"model.config_overrides{key}": at for key, at in settings.items()}
        )
        return loaded.recipe.model.config_overrides, [each for each in loaded.notes if "config_overrides" in each]

    changes, (note,) = kept(**{".head_dim": 64})
    assert changes == {"rope_theta": 1e6, "head_dim": 64}
    assert "rope_theta=1000000.0; model.config_overrides: null drops them" in note
    assert "head_dim" not in note
    assert kept(**{".rope_theta": 5e5}) == ({"rope_theta": 5e5}, [])
    assert kept(**{"": None}) == ({}, [])


def test_an_override_of_the_whole_mapping_keeps_nothing_of_the_config(write):
    for whole in ({}, {"head_dim": 64}):
        settings = ["model.path=other/model", f"model.config_overrides={json.dumps(whole)}"]
        loaded = load_recipe(write("parent.yaml", PARENT), settings)
        assert loaded.recipe.model.config_overrides == whole
        assert not any("config_overrides" in note for note in loaded.notes)


def test_random_weights_take_the_place_of_a_pretrained_model_and_back(lay):
    parent = PARENT.replace("lora: {rank: 4}\n", "")
    architecture = {"model_type": "llama", "num_hidden_layers": 4}
    model = lay({"model.architecture": architecture, "model.tokenizer": "t"}, parent).recipe.model
    assert (model.path, model.revision, model.architecture) == (None, None, architecture)
    first = PARENT.splitlines()[0]
    random = parent.replace(first, f"model: {{architecture: {json.dumps(architecture)}, tokenizer: t}}")
    model = lay({"model.path": "some/model"}, random).recipe.model
    assert (model.path, model.architecture, model.tokenizer) == ("some/model", None, None)
    model = lay({"model.architecture.model_type": "qwen3"}, random).recipe.model
    assert model.architecture == {"model_type": "qwen3"}


def test_adapters_and_training_new_modules_alone_exclude_each_other(lay):
    sparsek = PARENT.replace("{method: power, block: 16, window: 3, dense_layers: [0]}", "{method: sparsek}")
    loaded = lay({"train.parameters": "new_modules"}, sparsek)
    assert (loaded.recipe.lora, loaded.recipe.train.parameters) == (None, "new_modules")
    alone = sparsek.replace("lora: {rank: 4}\n", "").replace("{tokens", "{parameters: new_modules, tokens")
    loaded = lay({"lora.rank": 8}, alone)
    assert (loaded.recipe.lora.rank, loaded.recipe.train.parameters) == (8, "all")
    assert lay({"lora": None}).recipe.lora is None


def test_another_method_keeps_what_both_have(lay):
    loaded = lay({"attention.method": "sliding", "attention.sinks": 2})
    attention = loaded.recipe.attention
    assert (attention.block, attention.window, attention.sinks, attention.dense_layers) == (16, 9, 2, [0])
    assert any("window=3 dropped, block, dense_layers kept" in note for note in loaded.notes)


def test_an_error_says_where_the_other_setting_comes_from(write):
    write("parent.yaml", PARENT)
    child = write("child.yaml", "base: parent\nsequence: {length: 100}\n")
    with pytest.raises(
        RecipeError,
        match=r"parent\.yaml:5: train\.global_batch_tokens: 256 is not .* \(sequence\.length: .*child\.yaml:2\)",
    ):
        load_recipe(child)


def test_a_shipped_base_is_named_as_one(write):
    child = write("child.yaml", "base: qwen3-0.6b-power-32k\nsequence: {length: 1000}\n")
    with pytest.raises(RecipeError, match=r"shipped recipe base/long-context\.yaml:\d+: train\.global_batch_tokens"):
        load_recipe(child)


def test_an_error_of_a_run_says_where_a_setting_comes_from(write):
    write("parent.yaml", PARENT)
    loaded = load_recipe(write("child.yaml", "base: parent\n"), ["train.lr=1"])
    with pytest.raises(RecipeError) as refused, loaded.naming_places():
        raise RecipeError("model.path=some/model is nowhere, train.lr too")
    assert "(model.path: " in str(refused.value)
    assert "parent.yaml:1) (train.lr: command line override train.lr=1)" in str(refused.value)
