"""Convert tool calls to the form that a chat template expects: arguments as objects or text, empty content or null.

The convention of transformers is objects and empty text. Some templates (DeepSeek's) concatenate the arguments as text,
or write calls only if the content is null.
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

# Words that templates are unlikely to contain.
_NAME, _KEY, _VALUE = ("\u2042name\u2042", "\u2042key\u2042", "\u2042value\u2042")


class _Convention(NamedTuple):
    arguments_as_text: bool
    content_as_null: bool


def as_called(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Convert turns with tool calls to the form that the tokenizer's template expects.

    Args:
        messages: Turns with call arguments as objects and contents as text.
        tools: The available tools; some tokenizers have a separate template for tools.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    convention = _convention(tokenizer, str(tokenizer.chat_template), tools is not None)
    return [_written(message, convention) if message.get("tool_calls") else message for message in messages]


@lru_cache(maxsize=8)
def _convention(tokenizer: PreTrainedTokenizerBase, template: str, with_tools: bool) -> _Convention:
    """The first convention with which the template writes a complete call; by default that of transformers."""
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
