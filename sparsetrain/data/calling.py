"""How a chat template wants the calls of a turn: arguments as objects or as text, an empty content as text or as null.

Transformers' own convention is objects and text. Some templates (DeepSeek's) join the arguments as text, or write calls
only where the content is null.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsetrain.data.chat_template import apply_template
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words that hardly any template writes itself.
_NAME, _KEY, _VALUE = ("\u2042name\u2042", "\u2042key\u2042", "\u2042value\u2042")


class _Convention(NamedTuple):
    arguments_as_text: bool
    content_as_null: bool


def as_called(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Turns as the tokenizer's template wants them, if any of them calls a tool.

    Args:
        messages: turns whose calls have arguments as objects, and whose contents are text.
        tools: the tools that may be called; some tokenizers have a template of their own for them.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    convention = _convention(tokenizer, str(tokenizer.chat_template), tools is not None)
    return [_written(message, convention) if message.get("tool_calls") else message for message in messages]


@lru_cache(maxsize=8)
def _convention(tokenizer: PreTrainedTokenizerBase, template: str, with_tools: bool) -> _Convention:
    """The first convention in which the template writes a call whole; transformers' own if it does in none."""
    schema = {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}}
    tools: list[dict[str, Any]] | None = [{"type": "function", "function": schema}] if with_tools else None
    call = {"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    for convention in (_Convention(*each) for each in product((False, True), repeat=2)):
        turns = [
            {"role": "user", "content": "?"},
            _written({"role": "assistant", "content": "", "tool_calls": [call]}, convention),
            {"role": "tool", "content": "!", "tool_call_id": "call00000", "name": _NAME},
            {"role": "assistant", "content": "."},
        ]
        try:
            text = apply_template(tokenizer, turns, tools=tools).text
        except MalformedRow:
            continue
        if text.count(_NAME) > with_tools and _KEY in text and _VALUE in text:
            return convention
    return _Convention(False, False)


def _written(message: dict[str, Any], convention: _Convention) -> dict[str, Any]:
    calls = message["tool_calls"]
    if convention.arguments_as_text:
        calls = [{**call, "function": _with_text(call["function"])} for call in calls]
    content = None if convention.content_as_null and not message["content"] else message["content"]
    return {**message, "content": content, "tool_calls": calls}


def _with_text(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
