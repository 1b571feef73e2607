"""The experiment on recycled attention: which answers count, what each reading reads, and its table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from sparsetrain.recipes.evidence.needle_questions import write
from sparsetrain.recipes.evidence.recycled import TRAINED, Outcome, main, perplexities, reused, table, the_task
from sparsetrain.recipes.evidence.recycled_choices import chosen_and_found

from sparsetrain.data import collate
from sparsetrain.evaluation.decode_answers import Question
from sparsetrain.methods.base import PassDocuments
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

RECIPE = recipes_folder() / "evidence/recycled.yaml"


@pytest.mark.parametrize("every", [4, 8, 16, 32])
def test_answers_count_where_the_row_that_writes_them_does_not_choose(every):
    recipe = load_recipe(RECIPE).recipe
    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    row = the_task(recipe).build(tokenizer, 0).answered()[0]
    batch = collate([row])
    method = recipe.attention.model_copy(update={"generate_every": every}).build()
    segments = method.plan_pass(PassDocuments([0, 256], batch.prompts, batch.origin))
    question = Question.of(row, 0)
    (kept,) = reused([question], every)
    chosen = segments.starts.tolist()
    written = {len(question.prompt) + start - 1 for start in question.answers}
    assert {len(kept.prompt) + start - 1 for start in kept.answers} == written - set(chosen)
    assert len(question.answers) - len(kept.answers) == 32 // every
    with pytest.raises(typer.BadParameter, match="--every 2: all answers of a document"):
        reused([question], 2)


def test_the_table_has_a_row_for_each_training_and_reading():
    outcomes = [
        Outcome(trained, reading, every, seed, "answers found", found, 0.25)
        for trained, reading, found in (
            ("before", "all keys", 1.0),
            ("before", "window", 0.5),
            ("full", "window", 0.25),
        )
        for every in (4, 8)
        for seed in (3, 2)
    ]
    assert table(outcomes).splitlines() == [
        "| trained | reads | every 4, seed 2 | every 4, seed 3 | every 8, seed 2 | every 8, seed 3 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| before | all keys | 100.0% (25%) | 100.0% (25%) | 100.0% (25%) | 100.0% (25%) |",
        "| before | window | 50.0% (25%) | 50.0% (25%) | 50.0% (25%) | 50.0% (25%) |",
        "| full | window | 25.0% (25%) | 25.0% (25%) | 25.0% (25%) | 25.0% (25%) |",
    ]


def test_the_command_trains_and_each_model_answers(forked, tmp_path, monkeypatch):
    assert load_recipe(RECIPE, TRAINED["full"]).recipe.attention.method == "full"
    monkeypatch.setattr("sparsetrain.recipes.evidence.recycled.TRAINED", {"recycled": TRAINED["recycled"]})
    settings = [
        "model.path=sparsetrain:tiny",
        *("train.steps=1", "train.warmup=0", "train.micro_batch=1", "sequence.length=128"),
        "data.sources=[{synthetic: recall, keys: 16, lengths: [128]}]",
        "eval.tasks.recall={source: {synthetic: recall, keys: 16, lengths: [128]}, documents: 3}",
    ]
    main("recycled", settings, seed=[3], every=[8], out=tmp_path)
    outcomes = [Outcome(**each) for each in json.loads((tmp_path / "table.json").read_text())["measured"]]
    assert [(each.trained, each.reading) for each in outcomes] == [
        (trained, reading) for trained in ("before", "recycled") for reading in ("all keys", "recycled", "window")
    ]
    keys = {(each.trained, each.reading): each.keys for each in outcomes}
    for trained in ("before", "recycled"):
        assert keys[trained, "all keys"] == 1
        assert keys[trained, "recycled"] <= keys[trained, "window"] < keys[trained, "recycled"] + 0.01
        # 64 keys, 4 before the choice and those since; a quarter of the steps read everything.
        assert 0.55 < keys[trained, "recycled"] < 0.75
    assert "| recycled | window |" in (tmp_path / "table.md").read_text()


def test_a_question_is_read_in_steps_of_which_the_last_choice_is_as_old_as_it_should_be():
    """--question 26: the answer of a needle document begins 2, 2, 10 and 26 tokens behind a choice."""
    recipe = load_recipe(RECIPE.parent / "recycled-needles.yaml").recipe
    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    for row in the_task(recipe).build(tokenizer, 0).answered()[:3]:
        question = Question.of(row, 26)
        for every in (4, 8, 16, 32):
            (kept,) = reused([question], every)
            assert list(kept.answers) == [26]
        assert "What is the pass key" not in tokenizer.decode(question.prompt)


def test_needle_documents_are_prompts_and_questions_with_their_answer(tmp_path):
    write(tmp_path / "questions.jsonl", 4)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    for row in rows:
        name, key = re.fullmatch(
            r"What is the pass key of the (.+)\? The pass key of the \1 is (\d{5})", row["completion"]
        ).groups()
        assert f"\nImportant! The pass key of the {name} is {key}.\n" in row["prompt"]
        assert row["prompt"].count("Important!") == 4
        assert len(tokenizer(row["prompt"] + row["completion"]).input_ids) < 512
    assert len({row["prompt"] for row in rows}) == 4


def test_text_has_no_questions(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"--question 26: .* measures perplexity, not answers"):
        main("recycled-text", None, seed=[0], every=None, question=26, out=tmp_path / "out")


def test_text_is_measured_with_a_window_of_no_fewer_keys(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    task = json.dumps({"lengths": [128], "tokens": 256, "source": {"path": str(text), "split": "train"}})
    settings = [f"eval.tasks.perplexity={task}", "attention.keep=8"]
    recipe = load_recipe(RECIPE.parent / "recycled-text.yaml", settings).recipe
    found = perplexities("sparsetrain:tiny", recipe, "before", 0, [4])
    assert [each.reading for each in found] == ["all keys", "recycled", "window"]
    whole, recycled, window = found
    assert len({each.value for each in found}) == 3
    assert recycled.keys <= window.keys < recycled.keys + 0.15
    assert whole.keys == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["attention.method=full"], "attention.method=full; the comparison starts from recycled"),
        (["eval.tasks.recall=null", "eval.tasks.passkey={lengths: [128]}"], "the comparison needs one task"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, settings, message):
    with pytest.raises(typer.BadParameter, match=message):
        main("recycled", settings, seed=[0], every=None, out=tmp_path / "out")


def test_values_are_told_from_those_that_were_not_chosen():
    short = ["eval.tasks.recall={source: {synthetic: recall, keys: 16, lengths: [128]}, documents: 3}"]
    everything = chosen_and_found("sparsetrain:tiny", [*short, "attention.keep=4096"], 0)
    assert everything.shape == (3 * 15, 2)
    assert everything[:, 0].all()
    few = chosen_and_found("sparsetrain:tiny", [*short, "attention.keep=24"], 0)
    assert 0 < few[:, 0].mean() < 0.9
