"""The experiments on text by tokens trained on, and on facts that are known to be asked for: budgets and tables."""

from __future__ import annotations

import json

import pytest
import typer
from sparsetrain.recipes.evidence import hints, tokens
from sparsetrain.recipes.evidence.tokens import KEY_TOKENS, PERPLEXITY, Curve

from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

FOLDER = recipes_folder() / "evidence"
TEXT, HINTS = FOLDER / "text-long.yaml", FOLDER / "hints.yaml"


@pytest.mark.parametrize(("module", "file", "keys"), [(tokens, TEXT, 512), (hints, HINTS, 96)])
def test_no_method_reads_more_keys_than_power(module, file, keys):
    recipe = load_recipe(file).recipe
    blocks = recipe.sequence.length // recipe.attention.block
    for name, settings in module.methods(recipe).items():
        attention = load_recipe(file, settings).recipe.attention
        if attention.method == "sparsek":
            assert attention.sinks + attention.topk + attention.window == keys
        elif attention.method == "recycled":
            assert attention.sinks + attention.keep + attention.recent == keys
        elif attention.method == "longnet":
            assert attention.pattern(2).listed(blocks) <= recipe.attention.pattern().listed(blocks)
        elif name != "full":
            assert attention.pattern().max_key_blocks(blocks) * attention.block == keys


@pytest.mark.parametrize("hint", hints.HINTS)
def test_a_hint_is_that_of_all_documents(hint):
    recipe = load_recipe(HINTS).recipe
    given = load_recipe(HINTS, hints.hinted(recipe, hint)).recipe
    assert {source.hint for source in given.data.sources} == {given.eval.by_name["recall"].source.hint} == {hint}


def test_curves_have_a_column_for_each_number_of_tokens():
    points = [{0: {PERPLEXITY: 9.0, KEY_TOKENS: 4.0}, 1_600_000: {PERPLEXITY: end, KEY_TOKENS: 3.0}} for end in (8, 7)]
    curves = [Curve("power", seed, {}, each, "") for seed, each in zip((3, 2), points, strict=True)]
    assert tokens.table(curves, PERPLEXITY).splitlines() == [
        "| perplexity | 0.0M | 1.6M |",
        "| --- | ---: | ---: |",
        "| power | 9.00 / 9.00 | 7.00 / 8.00 |",
    ]


def test_found_answers_have_a_column_for_each_hint():
    outcomes = [
        hints.Outcome("power", hint, seed, found, 0.5)
        for seed, hint, found in ((3, "question", 0.5), (2, "question", 0.25), (2, "none", 0.1))
    ]
    assert hints.table(outcomes).splitlines() == [
        "| method | question | none |",
        "| --- | ---: | ---: |",
        "| power | 25.0% (0.500) / 50.0% (0.500) | 10.0% (0.500) |",
    ]


def test_what_there_is_not_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="--hint early: choose from question, mark, none"):
        hints.main("hints", [], hint=["early"], out=tmp_path)
    with pytest.raises(typer.BadParameter, match="--only 'fast': choose from 'full', 'power'"):
        tokens.main("text-long", [], only=["fast"], out=tmp_path)
    with pytest.raises(typer.BadParameter, match=r"attention\.block=60"):
        tokens.methods(load_recipe(TEXT, ["attention.block=60"]).recipe)


def test_the_loss_is_measured_while_a_run_goes_on(forked, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One two three four five six. " * 400)
    tasks = [f"eval.tasks.{name}" for name in ("perplexity", "key_tokens")]
    settings = [
        "model.path=sparsetrain:tiny",
        "model.dtype=float32",
        "sequence.length=256",
        f"data.sources.0.path={text}",
    ]
    settings += ["train.steps=2", "train.micro_batch=1", "train.warmup=0", "eval.every=1"]
    settings += [f"{task}.{setting}" for task in tasks for setting in ("lengths=[256]", "tokens=512")]
    settings += [f"{task}.source.{setting}" for task in tasks for setting in (f"path={text}", "split=train")]
    settings += ["eval.tasks.key_tokens.short=64", "eval.tasks.key_tokens.stride=32", "eval.tasks.key_tokens.alpha=-9"]
    settings += ["eval.tasks.key_tokens.beta=-20"]
    tokens.main("text-long", settings, seed=[5], parallel=1, only=["power"], out=tmp_path / "out")
    (curve,) = json.loads((tmp_path / "out/table.json").read_text())
    assert [*curve["points"]] == ["0", "256", "512"]
    assert {*curve["original"]} == {*curve["points"]["512"]} == {PERPLEXITY, KEY_TOKENS}
    assert curve["points"]["512"][PERPLEXITY] < curve["points"]["0"][PERPLEXITY]
    assert "| power |" in (tmp_path / "out/table.md").read_text()
