"""What a row says and its chat template does not write: nothing of it may be lost without a word."""

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
"""Stands around each word of a probe, and hardly in any template."""
_THOUGHT = "</think>"


class _Place(NamedTuple):
    """Something that a conversation says."""

    name: str
    """For people."""
    key: str
    """The column or key that would leave it out."""
    path: tuple[str | int, ...]
    """Where it stands among messages, tools and settings."""


def check_all_is_said(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Refuse a conversation of which ``text``, that its template wrote, leaves something out.

    A conversation of the same shape with a word of its own in each place is written once, for all rows of that shape.
    Where a word is missing, the row itself is written again with something else in that place; what makes no
    difference is not read.

    Raises:
        MalformedRow: a content, a call, a tool, a document, a setting or all reasoning is left out.
    """
    places = list(_places(conversation))
    shape = json.dumps(_probe(conversation, places))
    unread = [places[number] for number in _unread(tokenizer, str(tokenizer.chat_template), shape, tuple(places))]
    thoughts = [place for place in places if place.key in REASONING]
    # Templates leave out what was thought before the last question: it is enough if some is written.
    if not set(thoughts) <= set(unread):
        unread = [place for place in unread if place not in thoughts]
    for place in unread:
        if _is_kept(conversation, place) or _matters(_content(conversation), place, tokenizer, text):
            continue
        raise MalformedRow(
            f"the chat template does not write {place.name}; set model.tokenizer to one whose template does "
            "(also a copy of this tokenizer's folder with another chat_template.jinja)"
            + (f", or train without it by ignore: [{place.key}]" if place.key else "")
        )
    _check_thoughts(conversation, text)


def _is_kept(conversation: Conversation, place: _Place) -> bool:
    """Whether a place holds a rule about calls that the turns keep anyway, so that nothing is lost without it."""
    if place.key not in ("tool_choice", "parallel_tool_calls"):
        return False
    rule = conversation.settings[str(place.path[-1])]
    turns = [[call["function"]["name"] for call in turn.get("tool_calls", ())] for turn in conversation.messages]
    called = {name for names in turns for name in names}
    if place.key == "parallel_tool_calls":
        return rule is False and all(len(names) <= 1 for names in turns)
    if isinstance(rule, Mapping):
        function = rule.get("function", rule)
        return isinstance(function, Mapping) and function.get("name") in called
    return bool(called) if rule in ("required", "any") else rule == "none" and not called


def _places(conversation: Conversation) -> Iterator[_Place]:
    for number, turn in enumerate(conversation.messages):
        name = f"turn {number + 1}"
        if turn["content"].strip():
            yield _Place(f"the content of {name} (role {turn['role']})", "", ("messages", number, "content"))
        if turn.get("reasoning_content"):
            yield _Place(f"the reasoning_content of {name}", REASONING[0], ("messages", number, "reasoning_content"))
        for place, call in enumerate(turn.get("tool_calls", ())):
            path = ("messages", number, "tool_calls", place, "function")
            yield _Place(f"tool_calls[{place}] of {name}", "", (*path, "name"))
            if call["function"]["arguments"]:
                yield _Place(f"the arguments of tool_calls[{place}] of {name}", "", (*path, "arguments"))
    for number in range(len(conversation.tools or ())):
        yield _Place(f"tools[{number}]", "tools", ("tools", number, "function", "name"))
    for name, value in conversation.settings.items():
        if value is None or value in ("", [], {}):
            # It may mean something to a template, and says nothing that could be lost.
            continue
        column = name if name in ("documents", "tool_choice", "parallel_tool_calls") else "chat_template_kwargs"
        yield _Place(f"{column}.{name}" if column != name else name, column, ("settings", name))


def _content(conversation: Conversation) -> dict[str, Any]:
    """A copy of all that a template is given."""
    content = {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "settings": dict(conversation.settings),
    }
    return json.loads(json.dumps(content, default=str))


def _probe(conversation: Conversation, places: list[_Place]) -> dict[str, Any]:
    """The shape of a conversation: a word in each place, and nothing else of its own."""
    content = _content(conversation)
    content["messages"] = [{key: _blank(key, value) for key, value in turn.items()} for turn in content["messages"]]
    content["tools"] = content["tools"] and [
        {"type": "function", "function": {"name": "", "description": "of a tool", "parameters": _NO_PARAMETERS}}
        for _ in content["tools"]
    ]
    for number, place in enumerate(places):
        _put(content, place.path, _word(number))
    return content


_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def _blank(key: str, value: Any) -> Any:
    if key == "role":
        return value
    if key == "tool_calls":
        # Nine letters and digits, as some templates ask of an id.
        return [{"id": "call00000", "type": "function", "function": {"name": "", "arguments": {}}} for _ in value]
    if key == "tool_call_id":
        return "call00000"
    return "" if isinstance(value, str) else value


def _put(content: dict[str, Any], path: tuple[str | int, ...], word: str) -> None:
    """Put a word in a place: beside what stands there, where that has a structure of its own."""
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
        # Some settings are switches; what they do is seen when they are altered.
        pass
    else:
        node[last] = f"{value}{word}"
        if last == "reasoning_content":
            node["thinking"] = node[last]


@lru_cache(maxsize=4096)
def _unread(
    tokenizer: PreTrainedTokenizerBase, template: str, shape: str, places: tuple[_Place, ...]
) -> tuple[int, ...]:
    """The places whose words a template does not write, by number; all of them if it refuses the probe."""
    content = json.loads(shape)
    try:
        text = Conversation(**content).written(tokenizer).text
    except MalformedRow:
        return tuple(range(len(places)))
    return tuple(
        number
        for number, place in enumerate(places)
        if _word(number) not in text
        and (place.path[0] != "settings" or not _matters(json.loads(shape), place, tokenizer, text))
    )


def _matters(content: dict[str, Any], place: _Place, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a template writes something else if something else stands in a place."""
    plain = json.loads(json.dumps(content))
    _put(content, place.path, _word(0))
    if place.path[0] == "settings" and place.path[1] != "documents":
        value = content["settings"][place.path[1]]
        content["settings"][place.path[1]] = not value if isinstance(value, bool) else _word(0)
    try:
        if Conversation(**content).written(tokenizer).text != text:
            return True
        if place.path[0] != "settings":
            return False
        # Some settings change only how the assistant is prompted.
        first, second = (Conversation(**each).written(tokenizer, prompt=True).text for each in (plain, content))
        return first != second
    except MalformedRow:
        return True


def _word(number: int) -> str:
    return f"{_MARK}{number}{_MARK}"


def _check_thoughts(conversation: Conversation, text: str) -> None:
    """Templates of reasoning models cut what was thought out of the text of turns, even out of one that is learned.

    As with ``reasoning_content``, it is enough if they write some of it: earlier thoughts are cut in generation too.
    """
    thoughts = {
        number: turn["content"][: turn["content"].index(_THOUGHT)].replace("<think>", "").strip()
        for number, turn in enumerate(conversation.messages)
        if turn["role"] == "assistant" and _THOUGHT in turn["content"] and conversation.learns(number)
    }
    if thoughts and not any(thought in text for thought in thoughts.values()):
        raise MalformedRow(
            f"the chat template leaves out what turn {max(thoughts) + 1} thinks before {_THOUGHT}, so that would not "
            "be learned; take a tokenizer whose template writes it, or delete it from the row"
        )
