"""Turns are found in the text of their conversation, also where the template writes the last one in its own way."""

from __future__ import annotations

import pytest

from sparsetrain.data.chat import render_chat
from sparsetrain.data.conversation import Conversation
from sparsetrain.data.values import MalformedRow

TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"to": 1}}}
WITH_TOOL = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "two"},
    TURNS[3],
]
HEAD, PROMPT = "<|start|>{{ m.role }}\n", "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
# Qwen3's thoughts, of the last turn alone; DeepSeek's, which only the prompt begins.
THINKS = (
    "{% for m in messages %}"
    + HEAD
    + (
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
        + CALLS
        + "<|end|>\n{% endfor %}"
        + PROMPT.replace("\n{%", "\n{% if think is false %}<think>\n\n</think>\n\n{% endif %}{%")
    )
)
PROMPTED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# gpt-oss's two end tokens, behind words that a byte-pair tokenizer would join with "<|".
RETURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Hermes' line end behind the answer of a tool, unless it is the last turn.
RESPONDS = (
    "{% for m in messages %}" + HEAD + "{{ m.content }}" + CALLS + "{% if m.role == 'tool' and not loop.last %}\n"
    "{% endif %}<|end|>\n{% endfor %}" + PROMPT
)
SYSTEM = (
    "<|start|>system\nBe kind.<|end|>\n{% for m in messages %}" + HEAD + "{{ m.content }}<|end|>\n{% endfor %}" + PROMPT
)
NAMES = ["start", "end", "return", "message", "user", "assistant", "tool"]


@pytest.fixture
def learned(byte_tokenizer):
    def of(template, turns=TURNS, **settings):
        tokenizer = byte_tokenizer(extra_special_tokens=[f"<|{name}|>" for name in NAMES])
        tokenizer.chat_template = template
        input_ids, targets = render_chat(Conversation(turns, settings=settings), tokenizer)
        return [tokenizer.decode(input_ids[start:stop]) for start, stop in targets]

    return of


@pytest.mark.parametrize(
    ("template", "spans"),
    [
        (THINKS, ["1<|end|>\n", "<think>\n\n</think>\n\n2<|end|>\n"]),
        (PROMPTED, ["1<|end|>", "2<|end|>"]),
        (RETURNS, ["<|message|>1<|end|>", "<|message|>2<|return|>"]),
    ],
)
def test_a_last_turn_that_is_written_in_its_own_way_hides_no_other(learned, template, spans):
    assert learned(template) == spans


def test_what_a_setting_puts_into_the_prompt_is_no_part_of_the_turn(learned):
    assert learned(THINKS, think=False) == ["1<|end|>\n", "2<|end|>\n"]


def test_a_call_is_found_where_its_turn_is_no_longer_the_last(learned):
    spans = learned(THINKS, WITH_TOOL)
    assert spans == ['<call>add{"to": 1}<|end|>\n', "<think>\n\n</think>\n\n2<|end|>\n"]


def test_an_answer_is_found_behind_a_turn_that_is_written_in_another_way(learned):
    assert learned(RESPONDS, WITH_TOOL) == ['<call>add{"to": 1}<|end|>\n', "2<|end|>\n"]


@pytest.mark.parametrize("template", [SYSTEM, SYSTEM + "{% if not add_generation_prompt %}<eos>{% endif %}"])
def test_what_stands_before_a_first_turn_is_not_learned_with_it(learned, template):
    assert learned(template, TURNS[1:])[0] == "1<|end|>\n"


def test_thoughts_in_contents_are_refused_only_if_none_is_written(learned):
    cut = THINKS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] if KEEP else m.content }}")
    turns = [TURNS[0], {"role": "assistant", "content": "<think>hmm</think>1"}, *TURNS[2:3]]
    both = [*turns, {"role": "assistant", "content": "<think>aha</think>2"}]
    assert learned(cut.replace("KEEP", "not loop.last"), both)[0] == "1<|end|>\n"
    with pytest.raises(MalformedRow, match="leaves out what turn 2 thinks"):
        learned(cut.replace("KEEP", "true"), [*turns, TURNS[3]])
