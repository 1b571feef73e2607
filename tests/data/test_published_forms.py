"""Rows of the sets that people publish: read by their columns, or refused with the setting that reads them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparsetrain.cli import app
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{{ c.function.arguments | tojson }}{% endfor %}<eos>{% endfor %}"  # noqa: E501
DEEPSEEK = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<U>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- for tool in message['tool_calls'] %}"
    "{{'<A>[' + tool['type'] + ' ' + tool['function']['name'] + ' ' + tool['function']['arguments'] + ']'}}"
    "{%- endfor %}{{'<eos>'}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{'<A>' + message['content'] + '<eos>'}}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{{'<T>' + message['content']}}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{'<A>'}}{%- endif %}"
)
ASK, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"é": 1}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2", "tool_call_id": "a"}


@pytest.fixture
def read(rendered):
    """The text of a row, and that of each span that carries loss."""
    return lambda row, template=TEMPLATE, **source: rendered(row, template, **source)


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, "q\n\nc"),
        ({"instruction": "q", "context": "", "response": "a"}, "q"),
        ({"instruction": "q", "context": "c", "output": "a"}, "q\n\nc"),
        ({"instruction": "q", "output": "a", "response": "another", "question": "other"}, "q"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"question": "q", "context": "c", "answer": "a"}, "q\n\nc"),
        ({"article": "c", "question": "q", "answer": "a"}, "q\n\nc"),
        ({"passage": "c", "query": "q", "answer": "a"}, "q\n\nc"),
        ({"query": "q", "response": "a", "type": "t"}, "q"),
        ({"problem": "q", "solution": "a"}, "q"),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q"),
        ({"conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]}, "q"),
        ({"messages": [{"role": "prompter", "text": None, "content": "q"}, {"role": "bot", "content": "a"}]}, "q"),
    ],
    ids=str,
)
def test_questions_and_answers_under_every_usual_name_are_read(row, asked, read):
    assert read(row) == (f"<user>{asked}<eos><assistant>a<eos>", ["<assistant>a<eos>"])


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_stands_before_a_question(column, read):
    row = {column: "s", "question": "q", "response": "a"}
    assert read(row)[0] == "<system>s<eos><user>q<eos><assistant>a<eos>"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"problem": "q", "solution": "a", "answer": "4"}, r"may be the answer: 'solution', 'answer'.*\[answer\]"),
        ({"instruction": "q", "query": "r", "answer": "4"}, r"may be the question: 'instruction', 'query'"),
        ({"prompt": "q", "response": "a"}, r"did you mean completion_field: response\?"),
        ({"input": "q", "output": "a"}, r"did you mean prompt_field: input, completion_field: output\?"),
        ({"user": "q", "assistant": "a"}, r"prompt_field: user, completion_field: assistant"),
        ({"dialog": [ASK, ANSWER]}, r"did you mean messages_field: dialog\?"),
        ({"content": "words"}, r"did you mean text_field: content\?"),
        ({"id": 1, "title": "t", "premise": "c", "hypothesis": "q"}, "fit no known form. Set form"),
        ({"id": 1, "title": "t", "context": "c", "question": "q", "answers": {}}, r"\(SQuAD\); write the one that"),
        ({"instruction": "q", "instances": [{"input": "i", "output": "a"}]}, "a row of its own: {instruction"),
        ({"question_id": 81, "category": "c", "turns": ["q", "r"]}, "without answers .MT-Bench.*write messages"),
        ({"query": "q", "answers": '[{"name": "add"}]', "tools": "[]"}, r"write messages.*tool_calls: \[{name, argum"),
        ({"conversation_a": [ASK, ANSWER], "conversation_b": [ASK, ANSWER]}, "the better one as messages"),
        ({"task_id": 1, "prompt": "q", "canonical_solution": "a", "test": "t"}, "completion_field: canonical_solution"),
        ({"conversations": ["q", "a"]}, r"turn 1 is of type str.*such as {role: user, content"),
        ({"conversation": [{"input": "q", "output": "a"}]}, "no role, only 'input', 'output'.*are two turns"),
        ({"conversations": [{"from": "human", "text": "q"}]}, "no content, only 'from', 'text'.*{content: text}"),
        ({"messages": [ASK, CALLS, {**RESULT, "content": {"sum": 2}}]}, "of type dict.*as JSON in a string"),
        ({"messages": [ASK, CALLS, {**RESULT, "content": [{"sum": 2}]}]}, "has 'sum'.*as JSON in a string"),
        ({"messages": [ASK, {**ANSWER, "function_call": {"name": "", "arguments": ""}}]}, "names no function; leave"),
        ({"messages": [ASK, ANSWER], "tools": [{"name": ""}]}, r"tools'\[0\] has no name"),
        ({"question": "q", "choices": ["a", "b"], "answer": "a"}, "column 'choices'.*to choose from are not part"),
        ({"instruction": "q", "input": "i", "context": "c", "output": "a"}, "both input and context"),
        ({"article": "b", "question": "q", "context": "c", "answer": "a"}, "both context and article"),
        ({"instruction": "q", "output": "a", "corrected": "b"}, "column 'corrected'.*an answer that it corrects"),
        ({"mask": "User", "conversations": [ASK, ANSWER]}, "column 'mask'.*write train: true or false"),
        ({"conversations": [ASK, {**ANSWER, "mask": False}]}, r"turn 2 has 'mask'.*ignore: \[mask\]"),
        ({"prompt": "q", "context": "c", "completion": "a"}, "column 'context'.*write it into the prompt"),
        ({"text": "hi", "role": "prompter", "message_id": "1", "parent_id": None}, "is one turn of a conversation"),
        ({"text": "hi", "role": "assistant", "parent_id": "1"}, r"columns 'role', 'parent_id'.*\[role, parent_id\]"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "completion_field: chosen"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "set form: chat and messages_field: chosen"),
        ({"messages": [ASK, ANSWER], "chosen": ["a"], "rejected": ["b"]}, r"ignore: \[chosen, rejected\]"),
        ({"prompt": "q", "completion": "a", "label": False}, "this answer is a bad one.*on_malformed: skip"),
        ({"messages": [ASK, ANSWER], "kto_tag": False}, "this answer is a bad one"),
    ],
    ids=str,
)
def test_what_is_no_question_and_answer_is_refused_with_what_reads_it(row, told, read):
    with pytest.raises(DataError, match=told):
        read(row)


def test_the_setting_of_a_refusal_reads_the_row(read):
    row = {"problem": "q", "solution": "a", "answer": "4"}
    assert read(row, ignore=["answer"])[0] == "<user>q<eos><assistant>a<eos>"
    assert read({"messages": [ASK, {**ANSWER, "mask": 1}]}, ignore=["mask"])[1] == ["<assistant>1<eos>"]
    assert read({"prompt": "q", "response": "a"}, completion_field="response") == ("qa<eos>", ["a<eos>"])
    assert read({"dialog": [ASK, ANSWER]}, messages_field="dialog")[0].startswith("<user>one?")


def test_of_rows_that_are_marked_as_good_or_bad_the_good_ones_are_learned(read, stream, write_jsonl):
    assert read({"prompt": "q", "completion": "a", "label": True}) == ("qa<eos>", ["a<eos>"])
    rows = [{"prompt": "q", "completion": answer, "label": answer == "good"} for answer in ("good", "bad") * 3]
    given = stream({"path": write_jsonl(rows)}, on_malformed="skip")
    assert given._sources[0].malformed == 3


@pytest.mark.parametrize("tools", [None, [{"name": "add", "parameters": {}}]], ids=["alone", "with tools"])
def test_calls_are_written_by_templates_that_join_arguments_as_text_and_ask_for_null(tools, read):
    template = ("{% if tools %}{{ tools | tojson }}{% endif %}" if tools else "") + DEEPSEEK
    whole, learned = read({"messages": [ASK, CALLS, RESULT, ANSWER], "tools": tools}, template)
    assert whole.endswith('<U>one?<A>[function add {"é": 1}]<eos><T>2<A>1<eos>')
    assert learned == ['[function add {"é": 1}]<eos>', "1<eos>"]


def test_a_template_that_writes_words_or_calls_but_not_both_refuses_the_words(read):
    with pytest.raises(MalformedRow, match=r"does not write tool_calls\[0\] of turn 2"):
        read({"messages": [ASK, {**CALLS, "content": "Let me see."}, RESULT, ANSWER]}, DEEPSEEK)


@pytest.mark.parametrize(
    ("turns", "rule"),
    [
        ([ASK, ANSWER], {"parallel_tool_calls": False}),
        ([ASK, CALLS, RESULT, ANSWER], {"parallel_tool_calls": False, "tool_choice": "auto"}),
        ([ASK, CALLS], {"tool_choice": "required"}),
        ([ASK, CALLS], {"tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ([ASK, ANSWER], {"tool_choice": "none"}),
    ],
    ids=str,
)
def test_a_rule_about_calls_that_the_turns_keep_needs_no_template_that_reads_it(turns, rule, read):
    assert read({"messages": turns, **rule}) == read({"messages": turns})


@pytest.mark.parametrize(
    ("turns", "rule"),
    [
        ([ASK, {**CALLS, "tool_calls": [CALL, CALL]}], {"parallel_tool_calls": False}),
        ([ASK, CALLS], {"tool_choice": "none"}),
        ([ASK, ANSWER], {"tool_choice": "required"}),
        ([ASK, CALLS], {"tool_choice": {"type": "function", "function": {"name": "subtract"}}}),
        ([ASK, CALLS], {"tool_choice": "subtract"}),
    ],
    ids=str,
)
def test_a_rule_about_calls_that_the_turns_break_is_refused_unless_the_template_reads_it(turns, rule, read):
    name = next(iter(rule))
    with pytest.raises(MalformedRow, match=rf"does not write {name}.*ignore: \[{name}\]"):
        read({"messages": turns, **rule})
    assert read({"messages": turns, **rule}, f"{{{{ {name} }}}}{TEMPLATE}")[0].startswith(str(rule[name])[:4])


def test_validate_shows_how_a_published_set_is_read(tmp_path):
    data, recipe = tmp_path / "dolly.jsonl", tmp_path / "mine.yaml"
    data.write_text(json.dumps({"instruction": "Sum.", "context": "1 and 2", "response": "3", "category": "x"}) + "\n")
    recipe.write_text(f"base: quickstart\ndata: {{sources: [{{path: {data}}}]}}\n")
    said = CliRunner().invoke(app, ["recipe", "validate", str(recipe)])
    assert said.exit_code == 0, said.output
    shown = " ".join(said.output.split())
    assert "alpaca from 'instruction', 'response', 'context', not read: 'category'" in shown
    assert "1 and 2" in shown
