"""The probe of relays: the documents that it asks, what the pattern connects, and its table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from sparsetrain.recipes.evidence.relay import patterns, run_folder
from sparsetrain.recipes.evidence.relay_probe import CLASSES, Probed, main, questions, table
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

RECIPE = recipes_folder() / "evidence/relay.yaml"
SHORT = ["attention.block=4", "eval.tasks.recall.source.lengths=[64]", "eval.tasks.recall.source.keys=2"]
SAMPLES = 40


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")


def test_a_value_that_is_probed_stands_in_its_fact_and_behind_its_question_alone(tokenizer):
    asked = questions(load_recipe(RECIPE).recipe, tokenizer, 3, SAMPLES)
    classes = {int(each.tokens[each.question + 1]) for each in asked}
    assert len(classes) == CLASSES
    counts = np.zeros((8, CLASSES), dtype=int)
    for each in asked:
        (fact, answer) = np.flatnonzero(np.isin(each.tokens, list(classes)))
        key = each.tokens[each.question]
        assert np.flatnonzero(each.tokens == key).tolist() == [fact - 1, each.question]
        assert (fact // 16, answer, (fact + 1) % 16 > 0) == (each.block, each.question + 1, True)
        assert each.question >= 240, "the last block of 16"
        counts[each.block, each.kind] += 1
    assert (counts == SAMPLES // CLASSES).all()


@pytest.fixture
def model(tmp_path, tokenizer):
    """A folder of a model of recall.yaml with three layers, untrained."""
    config = load_recipe(RECIPE.with_name("recall.yaml")).recipe.model.architecture
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **layers})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_states_of_both_models_are_probed_once_and_know_only_what_is_connected(model, tmp_path):
    settings = [*SHORT, f"model.path={model}"]
    runs = tmp_path / "runs"
    with pytest.raises(typer.BadParameter, match=r"power-2 is not there; train it first: .*--seed 2 --only 'power'"):
        main("relay", settings, seed=[2], only=["power"], samples=SAMPLES, out=runs)
    run = run_folder(runs, "power", 2)
    run.mkdir(parents=True)
    for file in model.iterdir():
        (run / file.name).symlink_to(file)
    for _ in range(2):
        main("relay", settings, seed=[2], only=["power"], samples=SAMPLES, out=runs)
        (run / "model.safetensors").unlink(missing_ok=True)  # which would not be missed the second time
    before, trained = (Probed(**each) for each in json.loads((runs / "probe.json").read_text()))
    assert (before.trained, trained.trained) == (False, True)
    assert before.accuracy == trained.accuracy
    # From the last of 16 blocks: 8, of 1, 2 and 4 before it, is one hop away, and 9 to 12, but for 11, two.
    assert before.hops() == [0, 0, 0, 2, 0, 2, 2, 1]
    known, share = np.array(before.reached), np.array(before.accuracy)
    assert known.shape == share.shape == (3, 8)
    assert share[~known].mean() < 0.2 > np.mean(before.control)


def test_patterns_with_dense_layers_are_not_probed():
    assert "power, 2 dense" in patterns(load_recipe(RECIPE).recipe)
    with pytest.raises(typer.BadParameter, match="'power, 2 dense'"):
        main("relay", [], seed=[2], only=["power, 2 dense"], samples=SAMPLES, out=None)


def test_hops_are_layers_of_the_pattern_though_the_first_reach_no_fact():
    """As those of a window, from which the facts are far away."""
    reached = [[False, False], [False, False], [False, True], [True, True]]
    assert Probed("sliding", 2, True, 40, 1, reached, [], []).hops() == [3, 2]


def test_the_table_has_brackets_where_nothing_connects_fact_and_question():
    reached = [[False, False, False], [False, True, False], [True, True, False]]
    probed = [
        Probed("power", seed, True, 40, 1, reached, [[0.1] * 3, [0.1, 0.5, 0.2], [0.4, 1.0, 0.1]], [[0.1] * 3] * 3)
        for seed in (3, 2)
    ]
    assert table(probed).splitlines() == [
        "| pattern | after layer | 1 | 2 | never | control |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| power, trained | 1 | (10.0 / 10.0) | (10.0 / 10.0) | (10.0 / 10.0) | 10.0 / 10.0 |",
        "| power, trained | 2 | 50.0 / 50.0 | (10.0 / 10.0) | (20.0 / 20.0) | 10.0 / 10.0 |",
        "| power, trained | 3 | 100.0 / 100.0 | 40.0 / 40.0 | (10.0 / 10.0) | 10.0 / 10.0 |",
    ]
