from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.lr=2e-6", lambda r: r.train.lr, 2e-6),
        ("train.steps=7", lambda r: r.train.steps, 7),
        ("sequence.packing=false", lambda r: r.sequence.packing, False),
        ("train.max_grad_norm=null", lambda r: r.train.max_grad_norm, None),
        ("train.max_grad_norm=", lambda r: r.train.max_grad_norm, None),
        ("data.sources.0.path=a=b.jsonl", lambda r: r.data.sources[0].path, "a=b.jsonl"),
        ("wandb.tags=[a, '7']", lambda r: r.wandb.tags, ["a", "7"]),
        ("eval.tasks.passkey.lengths=[512,1024]", lambda r: r.eval.by_name["passkey"].lengths, [512, 1024]),
        ("attention.dense_layers=[0,-1]", lambda r: r.attention.dense_layers, [0, -1]),
        ("attention.dense_layers.count=1", lambda r: r.attention.dense_layers.count, 1),
        ("model.config_overrides.rope_theta=1000000.0", lambda r: r.model.config_overrides, {"rope_theta": 1e6}),
    ],
)
def test_overrides_are_typed_like_the_file(load, minimal, override, read, value):
    text = minimal.replace("window: 3", "window: 3, dense_layers: {count: 2, every: 7}")
    assert read(load(text, override).recipe) == value


def test_a_mapping_replaces_the_section_it_is_given_for(load, minimal):
    recipe = load(minimal, "attention={method: sliding, block: 16}").recipe
    assert (recipe.attention.method, recipe.attention.block, recipe.attention.window) == ("sliding", 16, 9)


def test_later_overrides_win(load, minimal):
    assert load(minimal, "train.steps=3", "train.steps=4").recipe.train.steps == 4


def test_mistakes_in_overrides_are_placed_on_the_command_line(refuse, minimal):
    message = refuse(minimal, "train.lrr=3", "sequence.length=short")
    assert "command line override train.lrr=3: train.lrr: unknown key; did you mean train.lr?" in message
    assert "command line override sequence.length=short: sequence.length: expected a whole number" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("train..lr=3", "expected key=value"),
        ("train.lr.x=3", "train.lr is 2e-05, which has no settings inside"),
        ("data.sources.1.path=x", "data.sources is a list of 1; name an entry by its number, from 0"),
        ("data.sources.first.path=x", "data.sources is a list of 1"),
        ("data.sources.0.path=*.jsonl", "quote values that hold YAML signs"),
        ("base=quickstart", "base belongs in a file"),
        ("version=99", "schema version 99"),
    ],
)
def test_impossible_overrides_say_why(refuse, minimal, override, expected):
    message = refuse(minimal, override)
    assert f"command line override {override}" in message
    assert expected in message


def test_a_contradiction_with_the_file_is_placed_on_the_command_line(refuse, minimal):
    message = refuse(minimal, "sequence.length=8")
    assert "run.yaml:2: attention.block: a block of 16 tokens is longer than sequence.length=8" in message
    assert "(sequence.length: command line override sequence.length=8)" in message
    override = "eval.tasks.perplexity.lengths=[64]"
    assert f"command line override {override}: eval.tasks.perplexity.source: is required" in refuse(minimal, override)


def test_changing_the_method_keeps_what_both_methods_have_and_says_so(load, minimal):
    text = minimal.replace("window: 3", "window: 3, dense_layers: [0]")
    loaded = load(text, "attention.sinks=2", "attention.method=sliding", "sequence.length=512")
    attention = loaded.recipe.attention
    assert (attention.method, attention.block, attention.window, attention.sinks) == ("sliding", 16, 9, 2)
    assert attention.dense_layers == [0]
    (note,) = [note for note in loaded.notes if "attention.method" in note]
    assert "window=3 dropped" in note
    assert "block, dense_layers kept" in note


def test_full_attention_keeps_no_block(load, minimal):
    loaded = load(minimal.replace("window: 3", "window: 3, dense_layers: [0]"), "attention.method=full")
    assert loaded.recipe.attention.dense_layers == [0]
    assert any("block=16, window=3 dropped, dense_layers kept" in note for note in loaded.notes)


def test_naming_the_method_it_already_has_changes_nothing(load, minimal):
    loaded = load(minimal, "attention.method=power")
    assert loaded.recipe.attention.block == 16
    assert not loaded.notes


def test_a_parameter_of_another_method_is_refused_on_the_command_line_too(refuse, minimal):
    message = refuse(minimal, "attention.method=full", "attention.window=4")
    assert "command line override attention.window=4: attention.window: unknown key" in message
