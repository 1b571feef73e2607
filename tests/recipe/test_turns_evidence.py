"""Conversations to train on: worded as the task asks, ended as the template ends answers, and never an evaluation's."""

from __future__ import annotations

import json

import pytest
import typer
from sparsetrain.recipes.evidence.turns import KINDS, TEMPLATE, Conversations, conversations, main

from sparsetrain.data.chat_template import apply_template
from sparsetrain.data.encoding import encode
from sparsetrain.evaluation.multi_turn.prompts import Talks
from sparsetrain.evaluation.tasks.multi_turn import MultiTurnSection
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.chat_templates import chat_template_text
from sparsetrain.recipe.shipped import recipes_folder

SECTION = MultiTurnSection(lengths=[384, 512], samples=2, turns=2, keys=3)


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    made.chat_template = chat_template_text(TEMPLATE)
    return made


def test_a_row_is_what_an_evaluation_reads_with_each_answer_ended_by_eos(tokenizer):
    assert load_recipe(recipes_folder() / "evidence/turns.yaml").recipe.model.chat_template == TEMPLATE
    for talk, row in zip(Talks(SECTION, tokenizer, 5).all(), Conversations(SECTION, tokenizer, 5).all(), strict=True):
        read, end = "", tokenizer.eos_token
        for turn in talk.turns:
            read += tokenizer.decode(turn.input_ids) + f" {turn.answer}"
        written = apply_template(tokenizer, row["messages"]).text
        assert written == read + end
        assert written.count(end) == len(talk.turns)
        ids = [token for turn in talk.turns for token in (*turn.input_ids, *encode(tokenizer, f" {turn.answer}"))]
        assert encode(tokenizer, written) == [*ids, tokenizer.eos_token_id]
        assert len(ids) < talk.length


def test_conversations_to_train_on_are_those_of_no_evaluation(tokenizer):
    sections = [SECTION.model_copy(update={"lengths": [length], "keys": keys}) for length, keys, _ in KINDS[:2]]
    asked = [talk.turns for section in sections for seed in (0, 1) for talk in Talks(section, tokenizer, seed).all()]
    trained = [json.dumps(conversations(512, 2000, seed)) for seed in (0, 0, 1)]
    assert trained[0] == trained[1] != trained[2]
    assert not any(turn.answer in rows for turns in asked for turn in turns for rows in trained)


def test_the_command_writes_as_many_tokens_of_each_length_once(tmp_path):
    file = tmp_path / "new/turns.jsonl"
    main(file, longest=512, tokens=4000, seed=0, parallel=2)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == conversations(512, 4000, 0)
    assert [len(row["messages"]) // 2 for row in rows] == [2] * 6 + [3] * 3
    for arguments, message in (({"longest": 512}, "exists already"), ({"longest": 600}, "--longest 600 is none of")):
        with pytest.raises(typer.BadParameter, match=message):
            main(file, tokens=1, seed=0, parallel=1, **arguments)
        file.unlink(missing_ok=True)
