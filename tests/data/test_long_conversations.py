"""Conversations of thousands of turns have the tokens and marks of short ones, in time that grows with their length."""

from __future__ import annotations

import copy
import random

import pytest

from sparsetrain.data import conversation as conversations
from sparsetrain.data import encoding, stretches
from sparsetrain.data.chat import render_chat
from sparsetrain.data.conversation import conversation_of
from sparsetrain.data.values import MalformedRow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: thoughts from the last question on, and none before.
THINKING = (
    "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    + CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.index0 > n.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
    )
)
SYSTEM_INSIDE = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% if loop.index0 < 2 %}[{{ s }}]{% endif %}"
    "{{ m.content }}<|im_end|>{% elif m.role != 'system' %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
# What no stretch of it can know.
COUNTED = "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.content }}<|im_end|>{% endfor %}"
FROM_THE_END = (
    "{% for m in messages %}<|im_start|>{{ m.content }}{% if loop.revindex > 20 %}!{% endif %}<|im_end|>{% endfor %}"
)
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def _turns(kind, number):
    draw = random.Random(0)
    words = [
        " ".join(draw.choices(["ok", "no", "<|im_start|>", "é", "\n", "yes"], k=draw.randint(1, 6)))
        for _ in range(number)
    ]
    chat = [{"role": ("user", "assistant")[turn % 2], "content": words[turn]} for turn in range(number)]
    if kind == "system":
        chat = [{"role": "system", "content": "Be brief."}, *chat]
    if kind == "same":
        chat = [{**turn, "content": "ok"} for turn in chat]
    if kind == "weights":
        chat = [{**turn, "train": number % 5 == 1} for number, turn in enumerate(chat)]
    if kind == "tools":
        calls = [
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "tool_call_id": "a"},
        ]
        chat = [*chat[:41], *calls * (number // 4), *chat[41:61], *calls * (number // 4)]
    return chat


@pytest.fixture
def of_chatml(byte_tokenizer):
    def of(template):
        tokenizer = copy.copy(byte_tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>"]))
        tokenizer.chat_template = template
        return tokenizer

    return of


@pytest.mark.parametrize("kind", ["plain", "system", "same", "weights", "tools"])
@pytest.mark.parametrize(
    "template",
    [CHATML, THINKING, SYSTEM_INSIDE, COUNTED, FROM_THE_END],
    ids=["chatml", "thinking", "system inside", "counted", "from the end"],
)
def test_a_long_conversation_is_read_as_one_that_is_written_whole_for_every_turn(
    template, kind, of_chatml, monkeypatch
):
    def outcome():
        try:
            return render_chat(conversation_of(_turns(kind, 120), "turns"), of_chatml(template))
        except MalformedRow as refusal:
            return str(refusal)

    monkeypatch.setattr(encoding, "LONG", 200)
    in_stretches = outcome()
    monkeypatch.setattr(encoding, "LONG", 10**9)
    monkeypatch.setattr(stretches, "LONG", 10**9)
    assert in_stretches == outcome()


@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["chatml", "thinking"])
def test_the_work_for_a_conversation_grows_with_its_length(template, of_chatml, monkeypatch):
    work = {"turns": 0, "characters": 0}
    apply_template, encode = conversations.apply_template, encoding._encode

    def counted_template(tokenizer, messages, **rest):
        work["turns"] += len(messages)
        return apply_template(tokenizer, messages, **rest)

    def counted_encode(tokenizer, text):
        work["characters"] += len(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(conversations, "apply_template", counted_template)
    monkeypatch.setattr(encoding, "_encode", counted_encode)
    monkeypatch.setattr(encoding, "LONG", 1000)
    done = []
    for number in (200, 800):
        work.update(turns=0, characters=0)
        render_chat(conversation_of(_turns("plain", number), "turns"), of_chatml(template))
        done.append(dict(work))
    assert done[1]["turns"] < 5 * done[0]["turns"]
    assert done[1]["characters"] < 5 * done[0]["characters"]
