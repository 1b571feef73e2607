"""Parse a conversation in the formats of OpenAI, ShareGPT, TRL and axolotl."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sparsetrain.data.calling import as_called
from sparsetrain.data.chat_template import ChatText, apply_template
from sparsetrain.data.loss_keys import Learned, learned_of
from sparsetrain.data.naming import Naming
from sparsetrain.data.tools import call_of, calls_of
from sparsetrain.data.values import MalformedRow, described, listed, plain, text_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"),
}
"""Role names in lower case, and the corresponding names in chat templates."""

CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose text is a tool call, or a list of them, as JSON."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's reasoning before its answer."""

REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "models are trained only on text"),
    "refusal": "write it as content, if it is to be learned",
}
"""Keys of turns, and columns, with a meaning that is not supported, and the reason."""

NO_NAMES = Naming()
"""Rows under the usual names."""

TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template, and the spans to learn."""

    messages: list[dict[str, Any]]
    """Turns: ``role``, ``content`` (text), ``tool_calls`` with arguments as objects, and other keys."""
    learned: list[Learned] = field(default_factory=list)
    """The learned part of each turn; empty: all assistant turns."""
    tools: list[dict[str, Any]] | None = None
    """Schemas of the available tools."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Additional variables of the template (``chat_template_kwargs``, ``documents``)."""

    def written(
        self, tokenizer: PreTrainedTokenizerBase, turns: int | None = None, *, prompt: bool = False
    ) -> ChatText:
        """The text of the first ``turns`` turns, by default of all (:func:`apply_template`)."""
        messages = as_called(self.messages[:turns], tokenizer, self.tools)
        return apply_template(tokenizer, messages, tools=self.tools, settings=self.settings, prompt=prompt)

    def learns(self, turn: int) -> Learned:
        """The learned part of a turn."""
        return self.learned[turn] if self.learned else self.messages[turn]["role"] == "assistant"

    @property
    def chosen(self) -> bool:
        """Whether the row selects another part to learn than all assistant turns."""
        return any(self.learns(turn) != (each["role"] == "assistant") for turn, each in enumerate(self.messages))

    def behind(self, system: str | None) -> Conversation:
        """Prepend a system prompt from a separate column.

        Raises:
            MalformedRow: The conversation already has a different one.
        """
        if not system or not system.strip():
            return self
        if self.messages[0]["role"] in ("system", "developer"):
            if self.messages[0]["content"] == system:
                return self
            raise MalformedRow("its system column and its first turn are two different system prompts")
        learned = [False, *self.learned] if self.learned else []
        return replace(self, messages=[{"role": "system", "content": system}, *self.messages], learned=learned)


def conversation_of(turns: Any, name: str, ignore: Collection[str] = (), naming: Naming = NO_NAMES) -> Conversation:
    """Parse a list of turns.

    Args:
        name: The name of the list in error messages.
        ignore: Keys of turns to ignore.
        naming: Other names of keys and roles.

    Raises:
        MalformedRow: It is not a list of turns, or a turn is unreadable or has an unsupported key.
    """
    if isinstance(turns, list) and not turns:
        raise MalformedRow(f"{name} is empty, not a list of turns")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise MalformedRow(f"{name} is {described(turns)}, not a list of turns, each {{role, content}}")
    read = [_turn(turn, f"turn {number}", ignore, naming) for number, turn in enumerate(turns, start=1)]
    return Conversation([message for message, _ in read], [learned for _, learned in read])


def _turn(turn: Any, name: str, ignore: Collection[str], naming: Naming) -> tuple[dict[str, Any], Learned]:
    """``{role, content, ...}``, from that or from ShareGPT's ``{from, value}``, and what is learned of it."""
    if not isinstance(turn, Mapping):
        raise MalformedRow(
            f"{name} is {described(turn)}, not a mapping with role and content; write who says it, such as "
            "{role: user, content: ...}"
        )
    turn = naming.turn(turn, name)
    keys = {key: value for key, value in turn.items() if value is not None and key not in ignore}
    named = _named(keys, naming, name)
    _refuse_unsupported(keys, name)
    role = ROLES[named]
    content, calls = _said(turn, keys, named, name)
    learned = learned_of(keys, role, content, name)
    thoughts = _thoughts(keys, role, name)
    message = {"role": role, "content": content, **({"tool_calls": calls} if calls else {})}
    return {**message, **thoughts, **plain(keys, name)}, learned


def _named(keys: dict[str, Any], naming: Naming, turn: str) -> str:
    """Remove the role of a turn and return its name, one of :data:`ROLES`."""
    named = _one_of(keys, ("role", "from"), turn)
    if named is None:
        raise MalformedRow(
            f"{turn} has no role, only {listed(list(keys))}",
            recipe="say which key is the role by turn_keys of its source, such as turn_keys: {role: speaker}. A "
            "question and its answer are two turns",
            row="write who says it, such as role: user",
        )
    if not isinstance(named, str):
        raise MalformedRow(f"the role of {turn} is {described(named)}, not a string")
    named = naming.role(named)
    if named.lower() not in ROLES:
        raise MalformedRow(
            f"{turn} has the unknown role {named!r}",
            recipe=f"say which it is by roles of its source, such as roles: {{assistant: {named}}}",
            row="write system, user, assistant or tool",
        )
    return named.lower()


def _refuse_unsupported(keys: dict[str, Any], turn: str) -> None:
    """Refuse keys with a meaning that is not supported, and remove them where they are empty."""
    for key, reason in REFUSED.items():
        # Some writers use an empty list for none.
        if keys.pop(key, None):
            raise MalformedRow(
                f"{turn} has {key!r}, and {reason}",
                recipe=f"ignore: [{key}] trains without it",
                row="leave it out",
            )


def _said(turn: Mapping[str, Any], keys: dict[str, Any], named: str, name: str) -> tuple[str, list[dict[str, Any]]]:
    """Remove what a turn says, and return its text and its calls of tools."""
    said = _one_of(keys, ("content", "value"), name)
    calls = calls_of(keys, name)
    content: str | None = ""
    if named in CALL_ROLES:
        if calls:
            raise MalformedRow(f"{name} is a {named}, and has tool_calls beside it")
        # A table holds a call as an object.
        call = said if isinstance(said, Mapping) else _content(said, f"the content of {name}")
        calls = call_of(call, f"the content of {name}, a {named},")
    else:
        content = _content(said, f"the content of {name}")
    if calls and ROLES[named] != "assistant":
        raise MalformedRow(f"{name} calls a tool, but its role is {ROLES[named]}")
    if content is None and not calls:
        if "content" in turn or "value" in turn:
            raise MalformedRow(f"the content of {name} is null, not a string")
        raise MalformedRow(
            f"{name} has no content, only {listed(list(turn))}",
            recipe="say which key is the content by turn_keys of its source, such as turn_keys: {content: text}",
            row="write what is said under content",
        )
    # Templates treat a missing content differently, but all accept an empty one.
    return content or "", calls


def _thoughts(keys: dict[str, Any], role: str, turn: str) -> dict[str, str]:
    """The assistant's reasoning, under both names that templates use."""
    said = {key: value for key in REASONING if (value := keys.pop(key, None))}
    if not said:
        return {}
    if role != "assistant" or len(set(map(str, said.values()))) > 1:
        fault = "which differ" if role == "assistant" else f"but its role is {role}"
        raise MalformedRow(f"{turn} has {' and '.join(said)}, {fault}")
    key, value = next(iter(said.items()))
    return dict.fromkeys(("reasoning_content", "thinking"), text_value(value, f"{key} of {turn}"))


def _one_of(keys: dict[str, Any], names: tuple[str, str], turn: str) -> Any:
    """Remove two keys and return the value of either."""
    first, second = (keys.pop(name, None) for name in names)
    if first is not None and second is not None and first != second:
        raise MalformedRow(f"{turn} has both {names[0]} and {names[1]}, and they differ")
    return second if first is None else first


def _content(value: Any, name: str) -> str | None:
    """The text of a content, which may be a list of parts."""
    if value is None or isinstance(value, str):
        return None if value is None else text_value(value, name)
    if not isinstance(value, Sequence):
        raise MalformedRow(f"{name} is {described(value)}, not a string; write data as JSON in a string")
    return "".join(_part(part, f"part {number} of {name}") for number, part in enumerate(value, start=1))


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return text_value(part, name)
    if not isinstance(part, Mapping):
        raise MalformedRow(f"{name} is {described(part)}, not a text")
    if "type" not in part and "text" not in part:
        raise MalformedRow(f"{name} is no text, but has {listed(list(part))}; write data as JSON in a string")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise MalformedRow(f"{name} is of type {kind!r}; only parts of type text are read")
    rest = [key for key, value in part.items() if value is not None and key in REFUSED]
    if rest:
        raise MalformedRow(f"{name} has {rest[0]!r}, and {REFUSED[rest[0]]}")
    return text_value(part.get("text"), f"the text of {name}")
