"""What rows of the usual formats say reaches the chat template and the loss, or is refused by name."""

from __future__ import annotations

import copy
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsetrain.data.chat_prompt import chat_prompt
from sparsetrain.data.forms import resolve_form
from sparsetrain.data.render import render
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError
from sparsetrain.source_section import DataSource

# Writes all that a conversation can hold, each kind with a sign of its own.
FULL = (
    "{% for t in tools or [] %}[tool {{ t | tojson }}]{% endfor %}"
    "{% for d in documents or [] %}[doc {{ d.text }}]{% endfor %}"
    "{% if mood is defined %}[mood {{ mood }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}(({{ m.reasoning_content }})){% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[call {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[call {{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
POOR = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
SCHEMA = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}}
TOOL = {"type": "function", "function": SCHEMA}


@pytest.fixture
def learned(rendered):
    """The text of a row by a template, and that of each span that carries loss."""
    return lambda row, template=FULL, **source: rendered(row, template, **source)


@pytest.mark.parametrize(
    "column",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [SCHEMA]},
        {"tools": json.dumps([SCHEMA])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": json.dumps(TOOL)},
        {"tools": [{"type": "function", **SCHEMA}]},
        {"tools": [{"type": "function", "function": {**SCHEMA, "parameters": json.dumps(SCHEMA["parameters"])}}]},
        {"functions": [SCHEMA]},
    ],
    ids=str,
)
def test_tools_of_every_form_reach_the_template_alike(column, learned):
    assert learned({"messages": [ASK, ANSWER], **column})[0].startswith(f"[tool {json.dumps(TOOL)}]<user>one?")


@pytest.mark.parametrize("column", [{"tools": value} for value in (None, [], "", "[]")], ids=str)
def test_no_tools_are_no_tools_however_they_are_written(column, learned):
    assert learned({"messages": [ASK, ANSWER], **column}, POOR) == ("<user>one?<eos><assistant>1<eos>", ["1<eos>"])


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": None}}}]},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "assistant", "content": "", "tool_calls": {"name": "add", "arguments": {"a": 1, "b": None}}},
        {"role": "assistant", "content": "", "tool_calls": [json.dumps(CALL)]},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": null}}'},
        {"from": "function_call", "value": {"name": "add", "arguments": {"a": 1, "b": None}}},
        {"role": "tool_call", "content": '[{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": null}"}]'},
    ],
    ids=str,
)
@pytest.mark.parametrize("template", [FULL, MARKED], ids=["full", "marked"])
def test_calls_of_every_form_reach_the_template_as_objects_and_are_learned(turn, template, learned):
    whole, spans = learned({"messages": [ASK, turn, {"role": "function", "name": "add", "content": "2"}]}, template)
    # A null that a string of JSON holds was written by somebody; that of an object is what a table puts there.
    in_a_string = re.search(r'\\+"b\\+": null', json.dumps(turn))
    arguments = '{"a": 1, "b": null}' if in_a_string else '{"a": 1}'
    assert spans == [f"[call add {arguments}]<eos>"]
    assert whole.endswith("<eos><tool>2<eos>")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{**ANSWER, "weight": 0}, ANSWER], ["1<eos>"]),
        ([{**ANSWER, "train": False}, {**ANSWER, "train": True}], ["1<eos>"]),
        ([{**ANSWER, "training": False}, {"from": "gpt", "value": "2", "loss": True}], ["2<eos>"]),
        ([{**ANSWER, "masked": True}, {**ANSWER, "content": "2", "masked": False}], ["2<eos>"]),
        ([{**ANSWER, "weight": 0}, {**ANSWER, "weight": 0}], []),
        ([{**ASK, "train": True}, {**ANSWER, "train": False}], ["one?<eos>"]),
        (
            [{**ANSWER, "content": "abcdef", "train_detail": [{"begin_offset": 1, "end_offset": 2, "train": True}]}],
            ["bc"],
        ),
        ([{**ANSWER, "content": "abc", "training_detail": [{"begin_offset": 1, "end_offset": 2}]}], ["bc<eos>"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("template", [FULL, MARKED], ids=["full", "marked"])
def test_turns_are_learned_as_they_say(turns, expected, template, learned):
    assert learned({"messages": [ASK, *turns]}, template)[1] == expected


def test_other_columns_of_a_conversation_reach_the_template(learned):
    row = {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "1"}], "system": "Be kind."}
    assert learned(row)[0] == "<system>Be kind.<eos><user>one?<eos><assistant>1<eos>"
    row = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"mood": "good"}, "documents": [{"text": "Owls."}]}
    assert learned(row)[0].startswith("[doc Owls.][mood good]<user>")
    thinking = {"messages": [ASK, {**ANSWER, "thinking": "hm"}]}
    assert learned(thinking)[1] == ["((hm))1<eos>"]


def test_alpaca_reads_system_and_history(learned, gpt2):
    row = {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}
    whole = "<system>s<eos><user>a<eos><assistant>b<eos><user>c<eos><assistant>d<eos>"
    assert learned(row) == (whole, ["b<eos>", "d<eos>"])
    form = resolve_form(DataSource(path="x"), list(row), gpt2)
    with pytest.raises(MalformedRow, match="'history' cannot be honoured: the tokenizer has no chat template"):
        render(row, form, gpt2)
    assert gpt2.decode(render({**row, "history": []}, form, gpt2).input_ids).startswith("s\n\n### Instruction:\nc")


def test_prompts_and_completions_that_are_turns_learn_the_completion(learned):
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [{**ANSWER, "content": "2"}], "tools": [TOOL]}
    whole, spans = learned(row)
    assert whole.endswith("<user>one?<eos><assistant>1<eos><user>one?<eos><assistant>2<eos>")
    assert spans == ["2<eos>"]


def test_contents_in_parts_are_joined(learned):
    parts = [{"type": "text", "text": "on", "image": None}, {"type": "text", "text": "e?"}]
    assert learned({"messages": [{"role": "user", "content": parts}, ANSWER]})[0].startswith("<user>one?<eos>")


@pytest.mark.parametrize(
    ("row", "template", "told"),
    [
        ({"messages": [ASK, ANSWER], "tools": [TOOL]}, POOR, r"does not write tools\[0\].*ignore: \[tools\]"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [CALL]}]}, POOR, r"does not write tool_calls\[0\] of turn.*qwen3"),
        ({"messages": [ASK, {**ANSWER, "reasoning": "hm"}]}, POOR, "does not write the reasoning_content of turn 2"),
        ({"messages": [ASK, ANSWER], "documents": [{"text": "a"}]}, POOR, "does not write documents"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": {"mood": 1}}, POOR,
         "does not write chat_template_kwargs.mood"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": {"tools": 1}}, FULL, "sets 'tools', which is not"),
        ({"messages": [{"role": "system", "content": "x"}, ASK, ANSWER]},
         "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "content of turn 1 .role system"),
        ({"messages": [ASK, {**ANSWER, "content": "<think>hm</think>1"}]},
         POOR.replace("m.content", "m.content.split('</think>')[-1]"), "leaves out what turn 2 thinks"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, FULL, "weight of turn 2 is 0.5"),
        ({"messages": [ASK, {**ANSWER, "weight": 0, "train": True}]}, FULL, "says by train and weight"),
        ({"messages": [ASK, {**ANSWER, "train_detail": [{"begin_offset": 0, "end_offset": 5}]}]}, FULL, "text of 1"),
        ({"messages": [{**ASK, "images": ["a.png"]}, ANSWER]}, FULL, r"turn 1 has 'images'.*ignore: \[images\]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, FULL,
         "part 1 of the content of turn 1 is of type 'image_url'"),
        ({"messages": [ASK, {"from": "function_call", "value": "add(1)"}]}, FULL, "a function_call, is not valid JSON"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {"name": "a", "arguments": "1"}}]}]}, FULL,
         "not an object"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {"name": "a", "arguments": {"b": "\ud800"}}}]}]},
         FULL,
         r"tool_calls of turn 2\[0\].function.arguments.b is not valid Unicode"),
        ({"messages": [ASK, {**ANSWER, "content": None}]}, FULL, "the content of turn 2 is null"),
        ({"messages": [{"role": "system", "content": "a"}, ASK, ANSWER], "system": "b"}, FULL, "different system"),
        ({"messages": [ASK, ANSWER], "rejected": [ANSWER]}, FULL, r"'rejected' cannot be honoured.*ignore"),
        ({"prompt": "a", "completion": "b", "label": False}, FULL, "'label' cannot be honoured"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, FULL, "'tools' cannot be honoured: its prompt and"),
        ({"prompt": [ASK], "completion": "b"}, FULL, "'prompt' is of type list, not a string"),
        ({"text": "a", "weight": 2.0}, FULL, "'weight' cannot be honoured"),
        ({"text": "a", "system": "b"}, FULL, "'system' cannot be honoured"),
        ({"text": "a", "image": {"bytes": b"1"}}, FULL, "'image' cannot be honoured"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(row, template, told, learned):
    with pytest.raises(MalformedRow, match=told):
        learned(row, template)


def test_what_is_refused_can_be_left_out(learned):
    row = {"messages": [ASK, {**ANSWER, "reasoning": "hm"}], "tools": [TOOL], "rejected": "x"}
    ignore = ["reasoning", "tools", "rejected"]
    assert learned(row, POOR, ignore=ignore) == ("<user>one?<eos><assistant>1<eos>", ["1<eos>"])
    with pytest.raises(DataError, match="ignore names 'reject', which is none of its columns"):
        learned(row, ignore=["reject"])
    with pytest.raises(DataError, match="ignore names 'messages', which its form reads"):
        learned(row, ignore=["messages"])


def test_metadata_is_left_alone(learned):
    row = {"id": 3, "label": 1, "text": "a text", "source": "web", "weight": 1, "images": []}
    assert learned(row)[0] == "a text<eos>"
    turns = [{**ASK, "id": "x", "name": "Ann"}, {**ANSWER, "annotations": [], "refusal": None}]
    assert learned({"messages": turns})[0] == "<user>one?<eos><assistant>1<eos>"


def test_preference_data_alone_says_what_to_set(learned):
    with pytest.raises(DataError, match=r"holds preference data.*completion_field: chosen.*ignore"):
        learned({"prompt": "a", "chosen": "b", "rejected": "c"})
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert learned(row, completion_field="chosen", ignore=["rejected"]) == ("ab<eos>", ["b<eos>"])


def test_tokens_are_taken_as_they_are(learned, tokenizer):
    ids = tokenizer("abcdef")["input_ids"]
    assert learned({"input_ids": ids})[0] == "abcdef"
    row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1, 1, 1, 1, 1, 0]}
    assert learned(row) == ("abcde", ["cde"])
    assert learned({"input_ids": ids, "completion_mask": [0, 0, 1, 1, 0, 0]})[1] == ["cd"]
    for wrong, told in (
        ({"input_ids": [999]}, "holds the token 999"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels must be -100 or the token itself"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 value beside 2 tokens"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "leaves out tokens between others"),
        ({"input_ids": ["a"]}, "a list of other things"),
        ({"input_ids": [True, False]}, "a list of other things"),
        ({"input_ids": [1, 2], "position_ids": [1, 0]}, "'position_ids' cannot be honoured"),
        ({"input_ids": [1, 2], "position_ids": 1}, "'position_ids' cannot be honoured"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "'seq_lengths' cannot be honoured: a row is one document"),
    ):
        with pytest.raises(MalformedRow, match=told):
            learned(wrong)


def test_parquet_gives_the_tokens_of_jsonl(tmp_path, write_jsonl, stream, tokenizer):
    """A table has all keys in every row; what it fills in is no part of a call or a schema."""
    calls = [{"city": "Rome"}, {"day": 3}, {"nested": {"a": 1}}, {"nested": {"b": [1, None]}}]
    rows = []
    for each in calls:
        call = {"function": {"name": "f", "arguments": each}}
        properties = {key: {"type": "string", "default": None} for key in each}
        turns = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
        rows.append({"messages": turns, "tools": [{"name": "f", "parameters": {"properties": properties}}]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with_template = copy.copy(tokenizer)
    with_template.chat_template = FULL
    texts = [
        [with_template.decode(next(read).input_ids) for _ in rows]
        for path in (write_jsonl(rows), str(tmp_path / "rows.parquet"))
        for read in [stream({"path": path, "shuffle": False}, tokenizer=with_template, packing=False, length=4096)]
    ]
    assert texts[0] == texts[1]
    assert '[call f {"city": "Rome"}]' in texts[0][0]
    assert '{"properties": {"day": {"type": "string"}}}' in texts[0][1]
    assert '{"nested": {"b": [1, null]}}' in texts[0][3]


def test_a_published_set_of_tool_calls_renders(test_data, tokenizer):
    rows = json.loads((test_data / "instruct/glaive_toolcall_en_demo.json").read_text())
    with_template = copy.copy(tokenizer)
    with_template.chat_template = FULL
    form = resolve_form(DataSource(path="x"), list(rows[0]), with_template)
    for row in rows[:60]:
        text = with_template.decode(render(row, form, with_template).input_ids)
        calls = [json.loads(turn["value"]) for turn in row["conversations"] if turn["from"] == "function_call"]
        assert all(
            f"[call {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}]" in text for call in calls
        )
        assert text.count("[tool {") == len(json.loads(row["tools"] or "[]"))


def test_a_column_that_the_first_line_lacks_is_read_in_the_others(write_jsonl, stream, tokenizer):
    with_template = copy.copy(tokenizer)
    with_template.chat_template = FULL
    more = {"messages": [ASK, ANSWER], "tools": [TOOL], "system": "Be kind."}
    path = write_jsonl([{"messages": [ASK, ANSWER]}, more])
    read = stream({"path": path, "shuffle": False}, tokenizer=with_template, packing=False, length=4096)
    first, second = (with_template.decode(next(read).input_ids) for _ in range(2))
    assert "Be kind." in second
    assert TOOL["function"]["name"] in second
    assert "Be kind." not in first
    ids = {"input_ids": [1, 2, 3]}
    read = stream({"path": write_jsonl([ids, {**ids, "labels": [-100, -100, 3]}]), "shuffle": False}, packing=False)
    assert [next(read).labels.tolist() for _ in range(2)] == [[-100, 2, 3], [-100, -100, 3]]


def test_a_setting_that_is_empty_says_nothing_that_could_be_lost(learned):
    row = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"mood": ""}}
    assert learned(row, POOR)[1] == ["1<eos>"]


def test_a_prompt_is_what_stands_before_the_answer_in_training(tokenizer, learned):
    with_template = copy.copy(tokenizer)
    turns = [
        {"from": "human", "value": "one?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": "{}"}'},
    ]
    turns, row = [*turns, {"from": "observation", "value": "1"}], {"tools": json.dumps([SCHEMA]), "system": "Be kind."}
    with_template.chat_template = FULL
    whole = learned({"conversations": [*turns, {"from": "gpt", "value": "1"}], **row})[0]
    assert with_template.decode(chat_prompt(turns, row, with_template)) == whole.removesuffix("1<eos>")
    with_template.chat_template = POOR
    with pytest.raises(MalformedRow, match=r"does not write tool_calls\[0\] of turn 2"):
        chat_prompt(turns, {}, with_template)
    with pytest.raises(MalformedRow, match=r"does not write tools\[0\]"):
        chat_prompt(turns[:1], row, with_template)
    for turn, columns, fault in (
        (ASK, {"tools": [TOOL]}, "does not write tools.*; leave it out of the row, or put a chat_template"),
        (ASK, {"images": ["a.png"]}, "column 'images' cannot be honoured: .*, or rename the column"),
        (ASK, {"history": [["a", "b"]]}, "column 'history' cannot be honoured: .*write its turns into messages"),
        ({"role": "sage", "content": "a"}, {}, "unknown role 'sage'; write system, user, assistant or tool"),
        ({"content": "a"}, {}, "has no role, only 'content'; write who says it"),
    ):
        with pytest.raises(MalformedRow, match=fault) as raised:
            chat_prompt([turn], columns, with_template)
        # There is no recipe.
        assert not re.search("ignore:|its source|model.chat_template", str(raised.value))
