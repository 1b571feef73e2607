"""The reference of recipes, written from the JSON Schema in the schema's order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

INTRODUCTION = """# Recipe reference

Every key of a recipe, in the order of `sparsetrain recipe show NAME --explain`, which prints the same with the values
of one recipe. The page is written from the schema that checks your file (`sparsetrain recipe schema`). How a file is
read, and what follows from it, is in [recipes](recipes.md).
"""


def reference(schema: dict[str, Any]) -> str:
    """The page, of :func:`sparsetrain.recipe.describe.json_schema`."""
    sections = {name: each for name, each in schema["properties"].items() if _named(each)}
    plain = {name: each for name, each in schema["properties"].items() if name not in sections}
    lines = [INTRODUCTION, "## The file itself", "", *_fields(schema, plain, "")]
    shown: dict[str, str] = {}
    for name, each in sections.items():
        lines += [f"## `{name}`", "", _text(each.get("description", "")), ""]
        lines += _section(schema, each, name, shown, top=True)
    return "\n".join(lines) + "\n"


def _section(
    schema: dict[str, Any], node: dict[str, Any], path: str, shown: dict[str, str], top: bool = False
) -> Iterator[str]:
    """The classes that a value may have, each with its fields and the sections inside.

    Args:
        shown: the path of each class that the page has already; it is not shown twice.
    """
    names, anchor = _named(node), path.replace("[]", "")
    if names[0] in shown:
        earlier = shown[names[0]]
        yield from (f"### `{path}` {{#{anchor}}}", "", f"As [`{earlier}`](#{earlier.replace('[]', '')}).", "")
        return
    shown |= dict.fromkeys(names, path)
    sections = [schema["$defs"][name] for name in names]
    shared = _shared(sections)
    if shared:
        yield from (f"### `{path}`, whatever the {_kind(sections[0])} {{#{anchor}-all}}", "")
        yield from _fields(schema, shared, anchor)
        yield from _inside(schema, shared, path, shown)
    for section in sections:
        kind = _kind(section)
        fields = {key: each for key, each in section["properties"].items() if key not in shared}
        if kind is not None:
            value = fields.pop(kind)["const"]
            yield from (f"### `{path}`, `{kind}: {value}` {{#{anchor}-{value}}}", "")
        elif not top:
            yield from (f"### `{path}` {{#{anchor}}}", "")
        about = _text(section.get("description", ""))
        if about != _text(node.get("description", "")):
            yield from (about, "")
        plain = {key: each for key, each in fields.items() if not _named(each) or _mixed(each)}
        yield from _fields(schema, plain, anchor if kind is None else f"{anchor}-{value}")
        yield from _inside(schema, fields, path, shown)


def _inside(schema: dict[str, Any], fields: dict[str, Any], path: str, shown: dict[str, str]) -> Iterator[str]:
    """The sections inside of a section."""
    for key, field in fields.items():
        if _named(field):
            yield from _section(
                schema, field, f"{path}.{key}{'[]' if _listed(field) and not _mixed(field) else ''}", shown
            )


def _kind(section: dict[str, Any]) -> str | None:
    """The field whose value says which of several sections it is."""
    return next((key for key in ("method", "task") if "const" in section["properties"].get(key, {})), None)


def _shared(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields that all of several sections have alike."""
    if len(sections) < 2:
        return {}
    first, *others = (section["properties"] for section in sections)
    return {key: each for key, each in first.items() if all(other.get(key) == each for other in others)}


def _fields(schema: dict[str, Any], fields: dict[str, Any], anchor: str) -> Iterator[str]:
    for name, field in fields.items():
        given = [_type(schema, field)]
        if "default" in field:
            given.append(f"default `{_value(field['default'])}`")
        key = f"{anchor}.{name}" if anchor else name
        yield f'<span id="{key}"></span>`{name}` · {" · ".join(each for each in given if each)}'
        yield f":   {_text(field['description'])}"
        yield ""


def _choices(node: dict[str, Any]) -> list[dict[str, Any]]:
    return node.get("anyOf") or node.get("oneOf") or [node]


def _named(node: dict[str, Any]) -> list[str]:
    """The sections that a value may be, or a list of which it is."""
    found = []
    for each in _choices(node):
        inner = [each, *(_choices(each["items"]) if isinstance(each.get("items"), dict) else ())]
        found += [one["$ref"].rpartition("/")[2] for one in inner if "$ref" in one]
    return found


def _listed(node: dict[str, Any]) -> bool:
    return any(each.get("type") == "array" for each in _choices(node))


def _mixed(node: dict[str, Any]) -> bool:
    """Whether the value may also be something plain, such as a list of numbers in the place of a rule."""
    return any("$ref" not in each and each.get("type") not in ("null",) and not _named(each) for each in _choices(node))


def _type(schema: dict[str, Any], node: dict[str, Any]) -> str:
    return " or ".join(filter(None, (_one(schema, each) for each in _choices(node))))


def _one(schema: dict[str, Any], node: dict[str, Any]) -> str:
    if "$ref" in node:
        section = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return f"`{{{', '.join(section['properties'])}}}`"
    if "anyOf" in node or "oneOf" in node:
        return _type(schema, node)
    if "const" in node:
        return f"`{_value(node['const'])}`"
    if "enum" in node:
        return ", ".join(f"`{_value(each)}`" for each in node["enum"])
    kind = node.get("type")
    if kind == "array":
        items = node.get("prefixItems")
        if items:
            return f"[{', '.join(_type(schema, each) for each in items)}]"
        return f"list of {_type(schema, node.get('items', {})) or 'values'}"
    if kind in ("integer", "number"):
        return _range({"integer": "whole number", "number": "number"}[kind], node)
    names = {"string": "text", "boolean": "`true` or `false`", "null": "`null`", "object": "mapping"}
    return names.get(str(kind), "")


def _range(word: str, node: dict[str, Any]) -> str:
    least, most = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    if least is None and above is not None and word == "whole number":
        least, above = above + 1, None
    parts = []
    if least is not None:
        parts.append(f"from {_number(least)}")
    elif above is not None:
        parts.append(f"above {_number(above)}")
    if most is not None:
        parts.append(f"to {_number(most)}")
    elif below is not None:
        parts.append(f"below {_number(below)}")
    return " ".join([word, *parts])


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e12 else f"{value:g}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _text(text: str) -> str:
    return " ".join(text.replace("``", "`").split())
