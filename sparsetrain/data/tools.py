"""Parse tools and tool calls into the form that chat templates expect: OpenAI's, with arguments as objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsetrain.data.values import MalformedRow, described, parsed


def tools_of(value: Any, name: str) -> list[dict[str, Any]] | None:
    """The schemas in a column, or None where there are none.

    Args:
        value: a list, or one as JSON, of ``{type: function, function: {...}}`` or of what stands under ``function``;
            every tool and its ``parameters`` may be JSON in a string.

    Raises:
        MalformedRow: it is none of that.
    """
    tools = parsed(value, name)
    if isinstance(tools, Mapping):
        tools = [tools]
    if tools is not None and not isinstance(tools, list):
        raise MalformedRow(f"{name} is {described(tools)}, not a list of tools")
    return [_tool(tool, f"{name}[{place}]") for place, tool in enumerate(tools or [])] or None


def _tool(value: Any, name: str) -> dict[str, Any]:
    tool = _unpacked(value, name)
    if not isinstance(tool, Mapping):
        raise MalformedRow(f"{name} is {described(tool)}, not the schema of a tool")
    if tool.get("type", "function") != "function":
        raise MalformedRow(f"{name} is of type {tool['type']!r}; only tools of type function are read")
    # Some write a schema with a type beside its name, without a function around it.
    function = tool["function"] if "function" in tool else {key: tool[key] for key in tool if key != "type"}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise MalformedRow(f"{name} has no name")
    function = dict(function)
    if isinstance(function.get("parameters"), str):
        function["parameters"] = parsed(function["parameters"], f"{name}.parameters")
    return {**(tool if "function" in tool else {}), "type": "function", "function": function}


def calls_of(keys: dict[str, Any], turn: str) -> list[dict[str, Any]]:
    """The calls of a turn, taken out of its keys: ``tool_calls``, or OpenAI's older ``function_call``.

    Raises:
        MalformedRow: they cannot be read, or both are there.
    """
    calls, old = (parsed(keys.pop(name, None), f"{name} of {turn}") for name in ("tool_calls", "function_call"))
    if calls and old:
        raise MalformedRow(f"{turn} has both tool_calls and function_call")
    if isinstance(calls, Mapping):
        calls = [calls]
    if calls is not None and not isinstance(calls, list):
        raise MalformedRow(f"tool_calls of {turn} is {described(calls)}, not a list of calls")
    if old:
        return [_call(old, f"function_call of {turn}")]
    return [_call(call, f"tool_calls[{place}] of {turn}") for place, call in enumerate(calls or [])]


def call_of(content: str | Mapping[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The calls in the content of a turn that is one.

    Raises:
        MalformedRow: it is no object, and no JSON, of ``{name, arguments}`` or of a list of those.
    """
    value = parsed(content, name)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise MalformedRow(f"{name} calls nothing")
    return [_call(call, name) for call in calls]


def _call(value: Any, name: str) -> dict[str, Any]:
    call = _unpacked(value, name)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"{name} is not a call: it must be {{name, arguments}}")
    if not function["name"]:
        raise MalformedRow(f"{name} names no function; leave the call out")
    if call.get("type", "function") != "function":
        raise MalformedRow(f"{name} is of type {call['type']!r}; only calls of functions are read")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments is None else _unpacked(arguments, f"the arguments of {name}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise MalformedRow(f"the arguments of {name} are {described(arguments)}, not an object")
    around = {key: value for key, value in call.items() if key not in ("type", "function", "name", "arguments")}
    if function is call:
        around.pop("parameters", None)
    return {**around, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _unpacked(value: Any, name: str) -> Any:
    """Parse a value that may be JSON in a string inside parsed JSON."""
    return parsed(value, name) if isinstance(value, str) else value
