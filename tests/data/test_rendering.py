"""Rows become tokens, and loss falls where the form says, to the token."""

from __future__ import annotations

import pytest

from sparsetrain.data.forms import resolve_form
from sparsetrain.data.render import render
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError
from sparsetrain.source_section import DataSource

PREFIX_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL_TEMPLATE = PREFIX_TEMPLATE.replace("<{{ m['role'] }}>", "{% if loop.last %}<{{ m['role'] }}>{% endif %}")


def learned(row, tokenizer, **source):
    """The text of the whole document, and that of each span that carries loss."""
    form = resolve_form(DataSource(path="x.jsonl", **source), list(row), tokenizer)
    input_ids, targets = render(row, form, tokenizer)
    return tokenizer.decode(input_ids), [tokenizer.decode(input_ids[start:stop]) for start, stop in targets]


def test_text_ends_with_eos_and_learns_all_but_its_first_token(gpt2, mistral):
    assert learned({"text": "Hello world"}, gpt2) == ("Hello world<|endoftext|>", [" world<|endoftext|>"])
    input_ids, targets = render({"text": "Hi"}, resolve_form(DataSource(path="x.txt"), ["text"], mistral), mistral)
    assert input_ids.tolist() == [1, *mistral("Hi", add_special_tokens=False)["input_ids"], 2]
    assert targets == [(1, len(input_ids))]


def test_prompt_and_completion_learn_the_completion(gpt2, mistral):
    row = {"question": "What is 6 x 7?", "answer": " It is 42."}
    fields = {"form": "prompt_completion", "prompt_field": "question", "completion_field": "answer"}
    assert learned(row, gpt2, **fields) == (
        "What is 6 x 7? It is 42.<|endoftext|>",
        [" It is 42.<|endoftext|>"],
    )
    assert learned(row, mistral, **fields) == ("<s> What is 6 x 7? It is 42.</s>", ["It is 42.</s>"])


def test_a_token_across_the_boundary_counts_to_the_completion(gpt2):
    whole, spans = learned({"prompt": "The answ", "completion": "er"}, gpt2)
    assert whole == "The answer<|endoftext|>"
    assert spans == [" answer<|endoftext|>"]


def test_an_empty_prompt_learns_all_but_the_first_token(gpt2):
    assert learned({"prompt": "", "completion": "Hello world"}, gpt2)[1] == [" world<|endoftext|>"]


CONVERSATION = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


def test_chat_learns_the_turns_its_template_marks(mistral):
    whole, spans = learned({"messages": CONVERSATION}, mistral)
    assert whole == "<s>[INST]  one?[/INST]  1</s>[INST]  two?[/INST]  2</s>"
    assert spans == [" 1</s>", " 2</s>"]


def test_chat_without_marks_learns_what_each_assistant_turn_adds(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", PREFIX_TEMPLATE)
    whole, spans = learned({"messages": CONVERSATION}, tokenizer)
    assert whole == "<user>one?<eos><assistant>1<eos><user>two?<eos><assistant>2<eos>"
    assert spans == ["1<eos>", "2<eos>"]


def test_chat_turns_whose_edges_merge_into_one_token_are_still_told_apart(gpt2, monkeypatch):
    monkeypatch.setattr(gpt2, "chat_template", PREFIX_TEMPLATE)
    whole, spans = learned({"messages": CONVERSATION}, gpt2)
    assert "><" in gpt2.tokenize(whole)
    assert spans == ["1<eos", "2<eos>"]


def test_chat_whose_template_rewrites_earlier_turns_is_malformed(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL_TEMPLATE)
    with pytest.raises(MalformedRow, match="up to turn 2 differently once it goes on"):
        learned({"messages": CONVERSATION}, tokenizer)


def test_sharegpt_conversations_are_chat(mistral):
    row = {"id": "7", "conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "1"}]}
    assert learned(row, mistral) == ("<s>[INST]  one?[/INST]  1</s>", [" 1</s>"])


def test_alpaca_is_chat_with_a_template_and_prompt_and_completion_without(mistral, gpt2):
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    assert learned(row, mistral) == ("<s>[INST]  Add.\n\n1 and 1[/INST]  2</s>", [" 2</s>"])
    assert learned(row, gpt2) == (
        "### Instruction:\nAdd.\n\n1 and 1\n\n### Response:\n2<|endoftext|>",
        ["2<|endoftext|>"],
    )
    assert (
        learned({"instruction": "Add 1.", "input": "", "output": "2"}, mistral)[0] == "<s>[INST]  Add 1.[/INST]  2</s>"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"prompt": None, "completion": "b"}, "'prompt' is null"),
        ({"messages": "a string"}, "'messages' is of type str, not a list of turns"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": [{"role": "user", "content": "a"}]}, "it has no assistant turn"),
        ({"messages": [{"role": "owl", "content": "a"}]}, "turn 1 has the unknown role 'owl'"),
        ({"messages": [{"content": "a"}]}, "turn 1 has no role"),
        ({"messages": [{"role": 1, "content": "a"}]}, "the role of turn 1 is of type int, not a string"),
        ({"messages": ["a"]}, "turn 1 is of type str, not a mapping"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "turn 2 is null"),
    ],
)
def test_rows_that_do_not_fit_their_form_are_malformed(row, reason, mistral):
    with pytest.raises(MalformedRow, match=reason):
        learned(row, mistral)


def test_a_template_that_refuses_a_conversation_makes_the_row_malformed(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(MalformedRow, match="the chat template refuses it: roles must alternate"):
        learned({"messages": CONVERSATION}, tokenizer)


def test_chat_needs_a_chat_template(gpt2):
    with pytest.raises(DataError, match=r"no chat template; set model\.chat_template"):
        learned({"messages": CONVERSATION}, gpt2)


def test_real_instruction_files_render(test_data, mistral, stream):
    path = str(test_data / "instruct/fastchat_dummy_conversation.json")
    rows = stream({"path": path, "shuffle": False}, tokenizer=mistral, length=2048, packing=False)
    assert rows._sources[0].size == 500
    row = next(rows)
    assert 0 < (row.labels != -100).sum() < len(row.labels)
    gsm8k = {"path": str(test_data / "instruct/gsm8k/test.jsonl"), "form": "prompt_completion"}
    rows = stream({**gsm8k, "prompt_field": "question", "completion_field": "answer"}, tokenizer=mistral, length=2048)
    assert rows._sources[0].size == 1319


def test_text_that_was_rendered_before_has_one_bos_and_one_eos(mistral):
    whole = [1, *mistral("Hi", add_special_tokens=False)["input_ids"], 2]
    for text in ("<s>Hi", "<s>Hi</s>", "Hi</s>", "\n<s>Hi</s>\n", "<s><s>Hi</s> </s>"):
        input_ids = render({"text": text}, resolve_form(DataSource(path="x"), ["text"], mistral), mistral).input_ids
        assert (input_ids.tolist().count(1), input_ids.tolist().count(2)) == (1, 1), text
        assert mistral.decode(input_ids).replace(" ", "") == "<s>Hi</s>"
        assert len(input_ids) <= len(whole)


def test_nothing_but_bos_and_eos_is_nothing(gpt2, byte_tokenizer):
    for tokenizer in (gpt2, byte_tokenizer(), byte_tokenizer(bos_token="<bos>")):
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
        for text in (eos, bos + eos, f" {bos}\n{eos} ", f"{bos}{bos} {eos}{eos}"):
            form = resolve_form(DataSource(path="x"), ["text"], tokenizer)
            assert not len(render({"text": text}, form, tokenizer).input_ids)
            assert learned({"prompt": bos, "completion": text}, tokenizer) == ("", [])


def test_an_empty_answer_is_learned_as_its_end_in_every_form(gpt2, mistral):
    for eos in ("", "<|endoftext|>"):
        assert learned({"prompt": "Any?", "completion": eos}, gpt2) == ("Any?<|endoftext|>", ["<|endoftext|>"])
    assert learned({"instruction": "Any?", "output": ""}, gpt2)[1] == ["<|endoftext|>"]
    assert learned({"prompt": "Any?", "completion": ""}, mistral) == ("<s> Any?</s>", ["</s>"])
    turns = [{"role": "user", "content": "Any?"}, {"role": "assistant", "content": ""}]
    for row in ({"messages": turns}, {"instruction": "Any?", "output": ""}):
        assert [text.strip() for text in learned(row, mistral)[1]] == ["</s>"]


def test_prompts_that_were_rendered_before_have_one_bos_and_one_eos(mistral):
    for prompt, completion in (("<s>[INST] a[/INST]", " b</s>"), ("[INST] a[/INST]", "<s> b"), ("", "<s>a b</s>")):
        whole, spans = learned({"prompt": prompt, "completion": completion}, mistral)
        assert (whole.count("<s>"), whole.count("</s>")) == (1, 1)
        assert spans[0].endswith("b</s>")


def test_a_separator_stands_between_prompt_and_completion_and_is_not_learned(gpt2):
    row = {"prompt": "6 x 7?", "completion": "42"}
    assert learned(row, gpt2, separator="\n") == ("6 x 7?\n42<|endoftext|>", ["42<|endoftext|>"])
    with pytest.raises(DataError, match="needs a column 'prompt'"):
        learned({"messages": CONVERSATION}, gpt2, separator="\n")


def test_a_column_that_the_recipe_names_decides_the_form(mistral):
    row = {"messages": CONVERSATION, "body": "Hello world"}
    assert learned(row, mistral, text_field="body")[0] == "<s> Hello world</s>"
    with pytest.raises(DataError, match="text_field and prompt_field belong to different forms"):
        learned(row, mistral, text_field="body", prompt_field="body")


def test_contents_that_were_rendered_before_have_one_bos_and_one_eos(mistral):
    turns = [{"role": "user", "content": "<s>one?"}, {"role": "assistant", "content": "1</s>"}]
    assert learned({"messages": turns}, mistral) == ("<s>[INST]  one?[/INST]  1</s>", [" 1</s>"])
