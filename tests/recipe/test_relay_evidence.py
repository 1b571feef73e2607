"""The experiment on static patterns: equal budgets, hops, the facts that are asked for, and the table by hops."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from sparsetrain.recipes.evidence.language import tasks
from sparsetrain.recipes.evidence.relay import (
    DENSE,
    NEVER,
    Outcome,
    facts,
    hops,
    main,
    measure,
    num_blocks,
    patterns,
    table,
    the_task,
)

from sparsetrain.layered_pattern import LayeredPattern
from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.patterns import DilatedPattern, DistancePattern, PowerPattern, SlidingPattern
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

RECIPE = recipes_folder() / "evidence/relay.yaml"
PAPER = [
    "attention.window=5",
    "attention.sinks=1",
    "sequence.length=2048",
    "eval.tasks.recall.source.lengths=[2048]",
    "model.config_overrides={max_position_embeddings: 2048}",
]


@pytest.mark.parametrize("settings", [[], PAPER], ids=["small", "as the paper"])
def test_no_pattern_reads_more_than_power(settings):
    recipe = load_recipe(RECIPE, settings).recipe
    blocks = num_blocks(recipe)
    known = {name: parse_attention(section).pattern(2) for name, section in patterns(recipe).items()}
    power = known["power"]
    for name, pattern in known.items():
        if name.startswith("longnet"):
            assert pattern.listed(blocks) <= power.listed(blocks)
        elif name.startswith("power, base 4") and "head" not in name:
            assert pattern.max_key_blocks(blocks) == power.max_key_blocks(blocks) + 2, (
                "more than the others, as it says"
            )
        elif name != "full":
            assert pattern.max_key_blocks(blocks) == power.max_key_blocks(blocks), name


def test_the_patterns_at_128_blocks_are_those_of_the_paper():
    known = patterns(load_recipe(RECIPE, PAPER).recipe)
    assert (known["sliding"]["window"], known["dilated"]["window"]) == (9, 10)
    assert (known["stride"]["window"], known["stride"]["stride"]) == (6, 32)
    assert known["longnet"]["segments"] == [[8, 1], [16, 2], [32, 4], [64, 8], [128, 16]]


def test_hops_are_those_of_the_distance():
    power = hops(PowerPattern(16, 1, 0), 16, 4)
    assert power == [distance.bit_count() or 1 for distance in range(15, -1, -1)]
    assert hops(SlidingPattern(16, 5, 0), 16, 4) == [-(-distance // 4) or 1 for distance in range(15, -1, -1)]
    assert hops(DilatedPattern(16, 2, 2), 6, 3) == [NEVER, 2, NEVER, 1, NEVER, 1]


@pytest.mark.parametrize(
    ("name", "blocks", "budget", "power", "sliding"),
    [("relay-long", 32, 6, 5, 7), ("relay-text", 32, 6, 5, 7), ("relay-longer", 64, 7, 6, 11)],
)
def test_the_long_recipes_need_the_hops_that_their_page_tells(name, blocks, budget, power, sliding):
    recipe = load_recipe(RECIPE.with_name(f"{name}.yaml")).recipe
    sections = patterns(recipe)
    known = {each: parse_attention(sections[each]).pattern(2) for each in ("power", "sliding")}
    assert (num_blocks(recipe), {pattern.max_key_blocks(blocks) for pattern in known.values()}) == (blocks, {budget})
    assert {each: max(hops(pattern, blocks, 7)) for each, pattern in known.items()} == {
        "power": power,
        "sliding": sliding,
    }


def test_hops_over_layers_that_differ_need_the_layers_that_take_them():
    near, far = DistancePattern(16, (0, 1), 0), DistancePattern(16, (0, 4), 0)
    cycle = LayeredPattern(16, (near, far))
    # After two layers a block has one step of each kind, after four two.
    assert hops(cycle, 7, 2) == [NEVER, 2, 1, NEVER, NEVER, 1, 1]
    assert hops(cycle, 7, 4) == [3, 2, 1, NEVER, 2, 1, 1]
    for layers in (1, 2, 3, 4):
        reached = [count != NEVER for count in hops(cycle, 7, layers)]
        assert reached == cycle.reach(7, layers)[-1].tolist()


def test_facts_are_where_the_answers_stand():
    recipe = load_recipe(RECIPE).recipe
    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    row = the_task(recipe).build(tokenizer, 0).answered()[0]
    assert row.input_ids[facts(row)].tolist() == row.labels[row.labels >= 0].tolist()
    assert facts(row).max() < len(row.input_ids) // 2


@pytest.mark.parametrize("name", ["needles", "passkey"])
def test_facts_of_text_are_where_their_digits_stand(name):
    """A space and digits follow "is" in the fact and in the question; of keys that are not asked for, none is meant."""
    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    for row in tasks(512)[name].build(tokenizer, 0).answered()[:5]:
        answer = row.labels[row.labels >= 0]
        (place,) = facts(row)
        assert row.input_ids[place : place + len(answer)].tolist() == answer.tolist()
        assert place < np.flatnonzero(row.labels >= 0)[0]
        assert tokenizer.decode(row.input_ids[place - 12 : place]).split()[-1] == "is"


def test_questions_must_fit_into_the_last_block():
    with pytest.raises(typer.BadParameter, match=r"attention\.block=8: documents of 256 tokens"):
        num_blocks(load_recipe(RECIPE, ["attention.block=8"]).recipe)
    with pytest.raises(typer.BadParameter, match="the comparison starts from power"):
        patterns(load_recipe(RECIPE, ["attention.method=sliding"]).recipe)


def test_the_table_has_a_column_for_each_number_of_hops():
    power = [
        Outcome("power", seed, 2.5, 3, 2, 0, [2, 3, 1], [10, 10, 20], [10, 5, found])
        for seed, found in ((3, 20), (2, 15))
    ]
    dilated = [Outcome("dilated", seed, 2.0, 3, 2, 0, [2, NEVER, 1], [10, 10, 20], [0, 1, 20]) for seed in (2, 3)]
    assert table([*power, *dilated]).splitlines() == [
        "| pattern | blocks | within reach | found | 1 | 2 | 3 | never |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| power | 2.5, at most 3 | 75.0 / 75.0 | 75.0 / 87.5 | 75.0 / 100.0 | 100.0 / 100.0 | 50.0 / 50.0 |  |",
        "| dilated | 2.0, at most 3 | 75.0 / 75.0 | 52.5 / 52.5 | 100.0 / 100.0 | 0.0 / 0.0 |  | 10.0 / 10.0 |",
    ]


def test_hybrids_of_seven_layers_have_two_dense_ones_or_one_to_five_sparse():
    sections = patterns(load_recipe(RECIPE).recipe)
    found = {kind: parse_attention(sections[f"power, {kind}"]).resolve_dense_layers(7) for kind in DENSE}
    assert found == {"2 dense": {2, 3}, "1 dense": {3}}, "layer 0 reads two tokens in any case"


def test_a_dense_layer_reaches_everything():
    alone = Outcome("power", 2, 2.5, 3, 1, 0, [2, 1], [10, 10], [0, 10])
    assert (alone.ceiling(), replace(alone, dense=1).ceiling()) == (0.5, 1.0)


def test_the_runner_trains_measures_by_block_and_repeats_nothing(forked, tmp_path):
    settings = ["model.path=sparsetrain:tiny", "train.steps=1", "train.warmup=0", "train.micro_batch=1"]
    settings += ["eval.tasks.recall.documents=2"]
    for _ in range(2):
        main("relay", settings, seed=[5], parallel=1, only=["power, 2 dense"], out=tmp_path)
        (log,) = tmp_path.glob("*.txt")
        written = log.stat().st_mtime_ns
    (outcome,) = json.loads((tmp_path / "table.json").read_text())
    assert [outcome[name] for name in ("method", "layers", "dense", "seed")] == ["power, 2 dense", 4, 2, 5]
    assert sum(outcome["asked"]) == sum(outcome["asked"][:8]) == 16
    assert log.stat().st_mtime_ns == written
    assert "| power, 2 dense |" in (tmp_path / "table.md").read_text()


def test_full_attention_finds_what_stands_before_the_question(tmp_path):
    """Of a model that copies nothing, none; the counts are those of the task."""
    recipe = load_recipe(RECIPE, ["eval.tasks.recall.documents=2"]).recipe
    outcome = measure("sparsetrain:tiny", {"method": "full"}, {"": the_task(recipe)}, 16, "full", 0)[""]
    assert (outcome.most_blocks, set(outcome.hops)) == (16, {1})
    assert np.all(np.array(outcome.found) <= outcome.asked)
