"""Refuse rows with content that the chat template does not write, so that nothing is lost silently."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsetrain.data.conversation import REASONING, Conversation
from sparsetrain.data.values import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u2042"
"""Delimiter of the words of a probe, which templates are unlikely to contain."""
_THOUGHT = "</think>"


class _Field(NamedTuple):
    """A field of a conversation that its template should write."""

    name: str
    """For people."""
    key: str
    """The column or key that ``ignore`` can name to drop it."""
    path: tuple[str | int, ...]
    """Its path in messages, tools and settings."""


def check_coverage(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Refuse a conversation if ``text``, its rendered template, omits one of its fields.

    A probe conversation of the same shape, with a unique word in each field, is rendered once for all rows of that
    shape. If a word is missing, the row itself is rendered again with another value in that field; if the text does not
    change, the template does not read the field.

    Raises:
        MalformedRow: A content, call, tool, document, setting or all reasoning is omitted.
    """
    fields = list(_fields(conversation))
    shape = json.dumps(_probe(conversation, fields))
    omitted = [fields[number] for number in _omitted(tokenizer, str(tokenizer.chat_template), shape, tuple(fields))]
    reasoning = [field for field in fields if field.key in REASONING]
    # Templates leave out what was thought before the last question: it is enough if some is written.
    if not set(reasoning) <= set(omitted):
        omitted = [field for field in omitted if field not in reasoning]
    for field in omitted:
        if _is_followed(conversation, field) or _has_effect(_content(conversation), field, tokenizer, text):
            continue
        of_tools = field.name.startswith(("tools[", "tool_calls["))
        which = "qwen3 is one, or a Jinja file" if of_tools else "a name or a Jinja file"
        raise MalformedRow(
            f"the chat template does not write {field.name}",
            recipe=f"set model.chat_template to one that does ({which})"
            + (f", or train without it by ignore: [{field.key}]" if field.key else ""),
            row="leave it out of the row, or put a chat_template.jinja that writes it beside the tokenizer",
        )
    _check_reasoning(conversation, text)


def _is_followed(conversation: Conversation, field: _Field) -> bool:
    """Whether a field is a rule about tool calls that the turns follow anyway, so that nothing is lost."""
    if field.key not in ("tool_choice", "parallel_tool_calls"):
        return False
    rule = conversation.settings[str(field.path[-1])]
    turns = [[call["function"]["name"] for call in turn.get("tool_calls", ())] for turn in conversation.messages]
    called = {name for names in turns for name in names}
    if field.key == "parallel_tool_calls":
        return rule is False and all(len(names) <= 1 for names in turns)
    if isinstance(rule, Mapping):
        function = rule.get("function", rule)
        return isinstance(function, Mapping) and function.get("name") in called
    return bool(called) if rule in ("required", "any") else rule == "none" and not called


def _fields(conversation: Conversation) -> Iterator[_Field]:
    for number, turn in enumerate(conversation.messages):
        name = f"turn {number + 1}"
        if turn["content"].strip():
            yield _Field(f"the content of {name} (role {turn['role']})", "", ("messages", number, "content"))
        if turn.get("reasoning_content"):
            yield _Field(f"the reasoning_content of {name}", REASONING[0], ("messages", number, "reasoning_content"))
        for index, call in enumerate(turn.get("tool_calls", ())):
            path = ("messages", number, "tool_calls", index, "function")
            yield _Field(f"tool_calls[{index}] of {name}", "", (*path, "name"))
            if call["function"]["arguments"]:
                yield _Field(f"the arguments of tool_calls[{index}] of {name}", "", (*path, "arguments"))
    for number in range(len(conversation.tools or ())):
        yield _Field(f"tools[{number}]", "tools", ("tools", number, "function", "name"))
    for name, value in conversation.settings.items():
        if value is None or value in ("", [], {}):
            # A template may read it, but it has no content that could be lost.
            continue
        column = name if name in ("documents", "tool_choice", "parallel_tool_calls") else "chat_template_kwargs"
        yield _Field(f"{column}.{name}" if column != name else name, column, ("settings", name))


def _content(conversation: Conversation) -> dict[str, Any]:
    """A copy of the template's input."""
    content = {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "settings": dict(conversation.settings),
    }
    return json.loads(json.dumps(content, default=str))


def _probe(conversation: Conversation, fields: list[_Field]) -> dict[str, Any]:
    """A probe with the shape of a conversation: a unique word in each field, and no other content."""
    content = _content(conversation)
    content["messages"] = [{key: _blank(key, value) for key, value in turn.items()} for turn in content["messages"]]
    content["tools"] = content["tools"] and [
        {"type": "function", "function": {"name": "", "description": "of a tool", "parameters": _NO_PARAMETERS}}
        for _ in content["tools"]
    ]
    for number, field in enumerate(fields):
        _put(content, field.path, _word(number))
    return content


_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def _blank(key: str, value: Any) -> Any:
    if key == "role":
        return value
    if key == "tool_calls":
        # Nine letters and digits, as some templates require of an id.
        return [{"id": "call00000", "type": "function", "function": {"name": "", "arguments": {}}} for _ in value]
    if key == "tool_call_id":
        return "call00000"
    return "" if isinstance(value, str) else value


def _put(content: dict[str, Any], path: tuple[str | int, ...], word: str) -> None:
    """Put a word into a field; if the field is structured, the word is added to it."""
    node: Any = content
    for step in path[:-1]:
        node = node[step]
    last = path[-1]
    value = node[last]
    if last == "arguments":
        node[last] = {**value, _MARK: word}
    elif last == "documents" and isinstance(value, list):
        node[last] = [dict.fromkeys(document, word) for document in value]
    elif path[0] == "settings":
        # Some settings are switches; their effect shows when they are changed.
        pass
    else:
        node[last] = f"{value}{word}"
        if last == "reasoning_content":
            node["thinking"] = node[last]


@lru_cache(maxsize=4096)
def _omitted(
    tokenizer: PreTrainedTokenizerBase, template: str, shape: str, fields: tuple[_Field, ...]
) -> tuple[int, ...]:
    """The indices of the fields whose words a template does not write; all of them if it refuses the probe."""
    content = json.loads(shape)
    try:
        text = Conversation(**content).written(tokenizer).text
    except MalformedRow:
        return tuple(range(len(fields)))
    return tuple(
        number
        for number, field in enumerate(fields)
        if _word(number) not in text
        and (field.path[0] != "settings" or not _has_effect(json.loads(shape), field, tokenizer, text))
    )


def _has_effect(content: dict[str, Any], field: _Field, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the rendered text changes with the value of a field."""
    plain = json.loads(json.dumps(content))
    _put(content, field.path, _word(0))
    if field.path[0] == "settings" and field.path[1] != "documents":
        value = content["settings"][field.path[1]]
        content["settings"][field.path[1]] = not value if isinstance(value, bool) else _word(0)
    try:
        if Conversation(**content).written(tokenizer).text != text:
            return True
        if field.path[0] != "settings":
            return False
        # Some settings change only the generation prompt.
        first, second = (Conversation(**each).written(tokenizer, prompt=True).text for each in (plain, content))
        return first != second
    except MalformedRow:
        return True


def _word(number: int) -> str:
    return f"{_MARK}{number}{_MARK}"


def _check_reasoning(conversation: Conversation, text: str) -> None:
    """Refuse learned turns from whose text the template removes all reasoning, as templates of reasoning models may do.

    As with ``reasoning_content``, it is sufficient if some of it is written: earlier reasoning is removed in generation
    too.
    """
    reasoning = {
        number: turn["content"][: turn["content"].index(_THOUGHT)].replace("<think>", "").strip()
        for number, turn in enumerate(conversation.messages)
        if turn["role"] == "assistant" and _THOUGHT in turn["content"] and conversation.learns(number)
    }
    if reasoning and not any(thought in text for thought in reasoning.values()):
        raise MalformedRow(
            f"the chat template leaves out what turn {max(reasoning) + 1} thinks before {_THOUGHT}, so that would not "
            "be learned; take a tokenizer whose template writes it, or delete it from the row"
        )
