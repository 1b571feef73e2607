from __future__ import annotations

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import load_recipe


@pytest.fixture
def parent(write, minimal):
    text = minimal.replace("steps: 30", "steps: 30\n  optimizer: {weight_decay: 0.1, eps: 1e-6}")
    return write("parent.yaml", text + "name: parent\noutput: runs/parent\nwandb: {tags: [a, b], project: p}\n")


def test_mappings_merge_and_lists_and_scalars_replace(write, parent):
    child = write(
        "child.yaml",
        """\
        base: parent.yaml
        train: {steps: 5, optimizer: {eps: 1e-5}}
        wandb: {tags: [c]}
        data: {sources: [{synthetic: passkey}]}
        """,
    )
    recipe = load_recipe(child).recipe
    assert (recipe.train.steps, recipe.train.lr) == (5, 2e-5)
    assert (recipe.train.optimizer.weight_decay, recipe.train.optimizer.eps) == (0.1, 1e-5)
    assert (recipe.wandb.tags, recipe.wandb.project) == (["c"], "p")
    assert [source.label for source in recipe.data.sources] == ["passkey"]


def test_name_and_output_are_not_inherited(write, parent):
    recipe = load_recipe(write("child.yaml", "base: parent")).recipe
    assert (recipe.name, recipe.output) == ("child", "runs/child")


def test_bases_chain_across_folders(write, parent, tmp_path):
    (tmp_path / "deeper").mkdir()
    write("deeper/middle.yaml", "base: ../parent.yaml\nsequence: {length: 256}\n")
    recipe = load_recipe(write("child.yaml", "base: deeper/middle.yaml\ntrain: {lr: 1e-4}\n")).recipe
    assert (recipe.sequence.length, recipe.train.lr, recipe.train.steps) == (256, 1e-4, 30)


def test_a_shipped_recipe_can_be_the_base(write):
    child = write("child.yaml", "base: qwen3-0.6b-power-32k\ntrain: {lr: 1e-6}\n")
    recipe = load_recipe(child).recipe
    assert recipe.train.lr == 1e-6
    assert recipe.model.path == "Qwen/Qwen3-0.6B-Base"


def test_another_method_does_not_inherit_the_parameters_of_the_first(write, parent):
    loaded = load_recipe(
        write("child.yaml", "base: parent\nattention: {method: sliding, window: 7}\nsequence: {length: 512}\n")
    )
    attention = loaded.recipe.attention
    assert (attention.method, attention.block, attention.window) == ("sliding", 16, 7)
    assert any(": window=3 dropped, block kept" in note and "child.yaml:2" in note for note in loaded.notes)


def test_the_same_method_does_inherit(write, parent):
    loaded = load_recipe(write("child.yaml", "base: parent\nattention: {window: 2}\n"))
    assert (loaded.recipe.attention.block, loaded.recipe.attention.window) == (16, 2)


def test_mistakes_are_placed_in_the_file_that_made_them(write, minimal):
    write("parent.yaml", minimal.replace("lr: 2e-5", "lr: fast"))
    with pytest.raises(RecipeError) as refused:
        load_recipe(write("child.yaml", "base: parent\nsequence: {lenght: 3}\n"))
    assert "parent.yaml:9: train.lr: expected a number" in str(refused.value)
    assert "child.yaml:2: sequence.lenght: unknown key; did you mean sequence.length?" in str(refused.value)


def test_a_missing_variable_of_the_base_is_settled_by_the_child(write, minimal, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    write("parent.yaml", minimal.replace("some/model", "'${env:NOWHERE}'"))
    assert load_recipe(write("child.yaml", "base: parent\nmodel: {path: x/y}\n")).recipe.model.path == "x/y"
    with pytest.raises(RecipeError, match=r"parent.yaml:1: model.path: the environment variable NOWHERE is not set"):
        load_recipe(write("child.yaml", "base: parent\n"))


@pytest.mark.parametrize("cycle", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_cycles_are_refused(write, cycle):
    for name, base in cycle.items():
        write(f"{name}.yaml", f"base: {base}.yaml\n")
    with pytest.raises(RecipeError, match=r"base recipes form a cycle: a\.yaml -> "):
        load_recipe(write("a.yaml", f"base: {cycle['a']}.yaml\n"))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("nowhere", r"child.yaml:1: base: there is no recipe nowhere"),
        ("qwen3-8b-power-128", r"did you mean qwen3-8b-power-128k\?"),
        ("[a, b]", r"base: expected the path or name of one recipe"),
        ("newer.yaml", r"newer.yaml:1: the recipe is written for schema version 99"),
    ],
)
def test_an_impossible_base_says_why(write, base, expected):
    write("newer.yaml", "version: 99\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write("child.yaml", f"base: {base}\n"))


def test_base_is_a_key_of_the_top_level_only(refuse, minimal):
    assert "train.base: unknown key" in refuse(minimal + "  base: quickstart\n")
