"""The templates that ship: they mark the turns that are found without marks, and write what the originals write."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparsetrain.data.chat import render_chat
from sparsetrain.data.conversation import Conversation
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.chat_templates import chat_template_text, shipped_templates

CONTROL = ["im_start", "im_end", "start_header_id", "end_header_id", "eot_id"]
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "It is 1."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "It is 2."},
]
THOUGHTS = [*TURNS[1:4], {**TURNS[4], "reasoning_content": "Hm.", "thinking": "Hm."}]
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"to": 1}}}
CALLS = [
    TURNS[1],
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
    *({"role": "tool", "content": content, "tool_call_id": "call00000"} for content in ("2", "3")),
    TURNS[4],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


@pytest.fixture(params=["gpt2", "mistral"])
def written(request):
    tokenizer = copy.deepcopy(request.getfixturevalue(request.param))
    names = [*(f"<|{name}|>" for name in CONTROL), "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names, "bos_token": tokenizer.bos_token})

    def write(template, turns=TURNS, tools=None):
        tokenizer.chat_template = template
        input_ids, targets = render_chat(Conversation(turns, tools=tools), tokenizer)
        return input_ids, [tokenizer.decode(input_ids[start:stop]) for start, stop in targets]

    return write


@pytest.mark.parametrize("name", shipped_templates())
def test_a_shipped_template_marks_what_is_found_without_its_marks(name, written):
    template = chat_template_text(name)
    assert written(template) == written(re.sub(r"{%-? (end)?generation %}", "", template))
    assert written(template)[1][0].strip().startswith("It is 1.")


@pytest.mark.parametrize(
    ("name", "original", "turns"),
    [
        ("llama3", "llama3", TURNS),
        ("gemma", "gemma3", TURNS),
        *(("qwen3", "qwen3", turns) for turns in (TURNS, THOUGHTS, CALLS)),
    ],
)
def test_a_shipped_template_writes_what_the_original_writes(name, original, turns, written):
    found = find_spec("trl")
    folder = Path(*(found.submodule_search_locations if found else ["-"])) / "chat_templates"
    if not folder.is_dir():
        pytest.skip("trl, which holds copies of the originals, is not installed")
    tools = TOOLS if turns is CALLS else None
    theirs = written((folder / f"{original}.jinja").read_text(), turns, tools)
    assert written(chat_template_text(name), turns, tools) == theirs


def test_mistrals_writes_what_the_tokenizers_own_writes(mistral):
    own = render_chat(Conversation(TURNS[1:]), mistral)
    named = copy.copy(mistral)
    named.chat_template = chat_template_text("mistral")
    assert render_chat(Conversation(TURNS[1:]), named) == own


def test_a_template_is_named_or_a_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert chat_template_text(str(file)) == "{{ messages }}"
    file.write_text(" ")
    with pytest.raises(RecipeError, match="is an empty file"):
        chat_template_text(str(file))
    with pytest.raises(RecipeError, match=r"did you mean chatml\?.*those are chatml, gemma, llama3"):
        chat_template_text("chat-ml")
