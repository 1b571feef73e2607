"""Data under names of its own: columns, keys and roles are mapped, and rows are chosen and held out."""

from __future__ import annotations

import copy
import json

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from sparsetrain.cli import app
from sparsetrain.data import sources
from sparsetrain.data.forms import resolve_form
from sparsetrain.data.render import render
from sparsetrain.data.tokens import held_out_tokens
from sparsetrain.errors import DataError
from sparsetrain.source_section import DataSource

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"


@pytest.fixture
def read(tokenizer):
    def of(row, **source):
        with_template = copy.copy(tokenizer)
        with_template.chat_template = TEMPLATE
        form = resolve_form(DataSource(path="x.jsonl", **source), list(row), with_template)
        return with_template.decode(render(row, form, with_template)[0])

    return of


def test_columns_of_other_names_are_read_as_what_the_recipe_says(read):
    row = {"task": "q", "given": "i", "reply": "a", "persona": "s", "past": [["p", "r"]], "id": 1}
    names = {"instruction": "task", "input": "given", "output": "reply", "system": "persona", "history": "past"}
    assert read(row, columns=names) == ("<system>s<eos><user>p<eos><assistant>r<eos><user>q\n\ni<eos><assistant>a<eos>")
    assert read({"body": "words"}, columns={"text": "body"}) == "words<eos>"


def test_turns_with_keys_and_roles_of_other_names_are_read(read):
    row = {"dialog": [{"speaker": "Seeker", "says": "q"}, {"speaker": "sage", "says": "a"}]}
    names = {"turn_keys": {"role": "speaker", "content": "says"}, "roles": {"user": "seeker", "assistant": ["Sage"]}}
    assert read(row, columns={"messages": "dialog"}, **names) == "<user>q<eos><assistant>a<eos>"


@pytest.mark.parametrize(
    ("row", "source", "told"),
    [
        ({"task": "q"}, {"columns": {"instrction": "task"}}, r"no meaning here \(did you mean instruction\?\)"),
        ({"task": "q"}, {"columns": {"instruction": "tsk"}}, r"in 'tsk' \(did you mean 'task'\?\)"),
        (
            {"a": "q", "text": "b"},
            {"columns": {"text": "a"}},
            "gives the name .text. to .a., and another column",
        ),
        ({"text": "b"}, {"roles": {"user": "me"}}, "roles has no effect on form text"),
        ({"messages": [{"role": "me", "content": "q"}]}, {}, r"unknown role 'me'.*roles: \{assistant: me\}"),
        (
            {"messages": [{"who": "user", "role": "user", "content": "q"}]},
            {"turn_keys": {"role": "who"}},
            "turn 1 has 'role' beside 'who'",
        ),
    ],
    ids=str,
)
def test_a_name_that_cannot_be_honoured_is_refused(row, source, told, read):
    with pytest.raises(DataError, match=told):
        read(row, **source)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"roles": {"user": "a", "assistant": ["b", "a"]}}, "roles gives 'a' two meanings"),
        ({"validation": 1.5}, "neither a fraction of the rows.*write 1 for 1 row, or a fraction such as 0.02"),
        ({"validation": 1.0}, "1.0 is neither a fraction of the rows, which is below 1"),
        ({"validation": 0.1, "streaming": True}, "needs the number of rows"),
        ({"validation": 0.1, "split": "test"}, "makes the splits train and validation"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(source, told):
    with pytest.raises(ValidationError, match=told):
        DataSource(path="x.jsonl", **source)


def texts_of(rows, number):
    return [next(rows).input_ids.tolist() for _ in range(number)]


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_first_rows_are_read(streaming, stream, write_jsonl, tokenizer):
    path = write_jsonl([{"text": f"row {number}"} for number in range(9)])
    given = stream({"path": path, "max_rows": 3, "streaming": streaming, "shuffle": False}, packing=False)
    assert [tokenizer.decode(ids) for ids in texts_of(given, 4)] == [f"row {n}<eos>" for n in (0, 1, 2, 0)]
    if streaming:
        state = given.state_dict()
        resumed = stream({"path": path, "max_rows": 3, "streaming": True, "shuffle": False}, packing=False)
        resumed.load_state_dict(state)
        assert texts_of(resumed, 4) == texts_of(given, 4)


@pytest.mark.parametrize(("validation", "held_out"), [(0.2, 4), (3, 3)])
def test_rows_are_held_out_whatever_the_seed_and_none_is_in_both(validation, held_out, stream, write_jsonl, tokenizer):
    rows = [{"text": f"{number:02d}"} for number in range(20)]
    source = {"path": write_jsonl(rows), "validation": validation}

    def trained(seed):
        given = stream({**source, "weight": 2.0}, packing=False, seed=seed)
        return {tokenizer.decode(ids) for ids in texts_of(given, 20 - held_out)}

    kept = held_out_tokens(DataSource(**source, split="validation"), tokenizer, 3 * held_out)
    measured = set(tokenizer.decode(kept.input_ids).replace("<eos>", "<eos> ").split())
    assert trained(0) == trained(1)
    assert len(measured) == held_out
    assert trained(0) | measured == {f"{number:02d}<eos>" for number in range(20)}


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"messages": TURNS}, {"messages": [*TURNS, {**TURNS[1], "role": "Sage", "learn": 0}]}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            {"turn_keys": {"train": "lern"}},
            r"says that train is 'lern' \(did you mean 'learn'\?\), and no turn has",
        ),
        (
            {"roles": {"assistant": "Sgae"}},
            r"says that assistant is 'sgae' \(did you mean 'sage'\?\), and",
        ),
        (
            {"roles": {"tool": ["a", "b"]}},
            r"tool is 'a' or 'b', and no turn has such a role; they have 'assistant'",
        ),
    ],
)
def test_names_that_no_turn_has_are_refused(source, told, streaming, stream, write_jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    with pytest.raises(DataError, match=told):
        stream({"path": write_jsonl(ROWS), "streaming": streaming, **source})


def test_names_that_some_turn_has_are_honoured(stream, write_jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    names = {"turn_keys": {"train": "learn"}, "roles": {"assistant": ["Sage", "Expert"]}}
    rows = stream({"path": write_jsonl(ROWS), "shuffle": False, **names})
    assert (next(rows).labels != -100).any()


def test_a_name_that_the_first_rows_of_a_stream_lack_is_a_warning(stream, write_jsonl, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr(sources, "FIRST_ROWS", 1)
    stream({"path": write_jsonl(ROWS), "streaming": True, "turn_keys": {"train": "learn"}})
    assert "no turn has such a key; they have 'content', 'role' (in the first 1 row" in caplog.text


def test_rows_that_cannot_be_held_out_are_refused(stream, write_jsonl):
    path = write_jsonl([{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match=r"holds out 0 of 2 rows.*none for validation"):
        stream({"path": path, "validation": 0.01})
    with pytest.raises(DataError, match=r"holds out 2 of 2 rows.*none for training"):
        stream({"path": path, "validation": 2})
    with pytest.raises(DataError, match="hold rows out by validation"):
        stream({"path": path, "split": "validation"})
    with pytest.raises(DataError, match="a split validation of its own"):
        stream({"path": "python-stdlib", "validation": 0.1})


def test_validate_knows_the_template_and_refuses_held_out_rows_that_are_trained_on(tmp_path):
    data, recipe = tmp_path / "chat.jsonl", tmp_path / "mine.yaml"
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant")]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    held_out = f"{{path: {data}, split: validation, validation: 1}}"

    def said(validation, template="chatml", more=""):
        recipe.write_text(
            f"base: quickstart\nmodel: {{chat_template: {template}}}\n"
            f"data: {{sources: [{{path: {data}, validation: {validation}{more}}}]}}\n"
            f"eval: {{tasks: [{{task: perplexity, lengths: [8], tokens: 16, source: {held_out}}}]}}\n"
        )
        result = CliRunner().invoke(app, ["recipe", "validate", str(recipe)])
        return result.exit_code, " ".join(result.output.split())

    code, output = said(1)
    assert code == 0, output
    assert "chat from 'messages'" in output
    code, output = said(2)
    assert code == 2
    assert "data.sources.0 trains on some of them" in output
    code, output = said(1, "chatm")
    assert code == 2
    assert "did you mean chatml?" in output
    code, output = said(1, more=", roles: {assistant: [asistant]}")
    assert code == 2
    assert "roles says that assistant is 'asistant' (did you mean 'assistant'?), and no turn has such a role" in output
    code, output = said("1.0")
    assert code == 2
    assert "write 1 for 1 row" in output
    assert "mine.yaml:3" in output
