"""Every turn that is learned is learned with the token that ends it, wherever the template writes that."""

from __future__ import annotations

import pytest

from sparsetrain.data.chat import render_chat
from sparsetrain.data.conversation import Conversation
from sparsetrain.data.ending import turn_ending

TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
CONTROL = ["<|start|>", "<|end|>", "<|user|>", "<|assistant|>", "<|observation|>"]
PROMPT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
LEARNED = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}GAP<|end|>\n{% endfor %}"
)
BETWEEN = (
    "{% for m in messages %}{% if not loop.first %}<|end|>\n{% endif %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|end|>\n<|start|>assistant\n{% endif %}"
)
NEXT_ROLE = (
    "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def learned(byte_tokenizer):
    def of(template, turns=TURNS, extra=CONTROL):
        tokenizer = byte_tokenizer(extra_special_tokens=list(extra))
        tokenizer.chat_template = template
        input_ids, targets = render_chat(Conversation(turns), tokenizer)
        spans = [tokenizer.decode(input_ids[start:stop]) for start, stop in targets]
        return turn_ending(tokenizer).kind, spans, tokenizer.decode(input_ids)

    return of


def test_an_end_token_of_the_turn_is_learned(learned):
    assert learned(LEARNED)[:2] == ("learned", ["1<|end|>\n", "2<|end|>\n"])


@pytest.mark.parametrize("gap", ["", " ", " \n"])
def test_an_end_token_that_the_marks_leave_out_is_learned_too(learned, gap):
    kind, spans, _ = learned(MARKED.replace("GAP", gap))
    assert kind == "left out"
    assert spans == [f"1{gap}<|end|>", f"2{gap}<|end|>"]


def test_the_token_of_the_next_role_is_learned_and_put_behind_the_last_turn(learned):
    kind, spans, text = learned(NEXT_ROLE)
    assert kind == "next role"
    assert spans == ["1<|user|>", "2<|user|>"]
    assert text.endswith("2<|user|>")


def test_the_token_of_a_tools_turn_ends_a_turn_and_that_of_another_assistants_turn_does_not(learned):
    turns = [TURNS[0], TURNS[1], {"role": "tool", "content": "3"}, TURNS[3], {"role": "assistant", "content": "4"}]
    assert learned(NEXT_ROLE, turns)[1] == ["1<|observation|>", "2", "4<|user|>"]


def test_a_conversation_that_ends_with_the_user_gets_no_end_token(learned):
    assert learned(NEXT_ROLE, TURNS[:3])[2].endswith("two?")


def test_an_end_token_that_stands_between_turns_is_put_behind_the_last(learned):
    kind, spans, text = learned(BETWEEN)
    assert kind == "next role"
    assert spans == ["1<|end|>", "2<|end|>"]
    assert text.endswith("2<|end|>")


def test_turns_that_end_in_plain_text_have_no_end_token(learned):
    assert learned(PLAIN)[:2] == ("none", ["assistant: 1\n", "assistant: 2\n"])


def test_what_a_template_writes_behind_the_last_turn_alone_is_no_other_writing(learned):
    closed = LEARNED + "{% if not add_generation_prompt %}<eos>{% endif %}"
    kind, spans, text = learned(closed)
    assert (kind, spans) == ("learned", ["1<|end|>\n", "2<|end|>\n<eos>"])
    assert text.endswith("2<|end|>\n<eos>")


def test_a_template_that_refuses_the_conversation_tried_is_unknown(learned):
    template = "{% if messages[0].content != 'one?' %}{{ raise_exception('no') }}{% endif %}" + LEARNED
    assert learned(template)[:2] == ("unknown", ["1<|end|>\n", "2<|end|>\n"])


def test_control_tokens_that_the_tokenizer_lacks_are_named(byte_tokenizer):
    tokenizer = byte_tokenizer(extra_special_tokens=["<|start|>"])
    tokenizer.chat_template = LEARNED
    ending = turn_ending(tokenizer)
    assert ending.in_pieces == (("<|end|>", 7),)
    assert [tokenizer.decode([token]) for token in ending.control] == ["<|start|>"]
