"""Parse YAML with the line of every value, and with the scalar types of YAML 1.2."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from sparsetrain.errors import RecipeError

KeyPath = tuple[str | int, ...]

OVERRIDE = "command line override"
"""Prefix of the place of a value from the command line."""

MOST_VALUES = 100_000
"""Maximum number of values of a recipe, with aliases expanded."""

DEEPEST = 32
"""Maximum nesting depth of lists and mappings."""

LARGEST = 2**63 - 1
"""The largest integer that the libraries used here support."""

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_INTERPOLATION = re.compile(r"\$\{([^}]*)\}")
_ENVIRONMENT = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)(?::(.*))?", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """Reads plain values; see the resolvers below."""


class _Dumper(yaml.SafeDumper):
    """Writes what the loader reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = all(item is None or isinstance(item, bool | int | float | str) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


# YAML 1.1 reads 2e-5 as text, 1:30 as 90, 010 as 8, on as true and 2024-01-01 as a date. Ours reads them as YAML 1.2
# does, and the dumper quotes by the same rules, so that what is written reads back as it was.
_PLAIN = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$", list("-+0123456789")),
    ("merge", r"^<<$", ["<"]),
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _PLAIN:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


@dataclass(frozen=True)
class Problem:
    """A mistake in a recipe: its place, field and description."""

    place: str
    path: KeyPath
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.path)}: {self.text}" if self.path else f"{self.place}: {self.text}"


@dataclass
class Source:
    """A parsed recipe: plain values, the place of each, and the mistakes found so far."""

    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: dict[KeyPath, Problem] = field(default_factory=dict)
    """Invalid values: a number out of range, or an unset environment variable. Each is null in ``data``, and replacing
    it removes the problem."""

    def place(self, path: KeyPath) -> str:
        """``file:line`` of a value, or of the nearest section around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def forget(self, path: KeyPath, value: Any) -> None:
        """Remove the places and problems of a value that will be replaced, and of everything inside it."""
        self.places.pop(path, None)
        self.unreadable.pop(path, None)
        for key, below in entries(value):
            self.forget((*path, key), below)


def entries(value: Any) -> Iterable[tuple[Any, Any]]:
    """The keys and values of a mapping, or the indices and values of a list; nothing for any other value."""
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def dotted(path: KeyPath) -> str:
    """``("data", "sources", 0)`` as ``data.sources.0``."""
    return ".".join(str(part) for part in path)


def parse_yaml(text: str, place: str, *, number_lines: bool = True) -> Source:
    """Parse YAML into plain values and their places.

    Args:
        text: The YAML.
        place: The name of the text in errors: the file's path.
        number_lines: Whether to add ``:line`` to the place.

    Raises:
        RecipeError: The text is not YAML, has a tag or a recursive alias, or has too many values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _Reader(loader, place, number_lines)
        reader.source.places[()] = f"{place}:1" if number_lines else place
        if node is not None:
            reader.source.data = reader.value(node, ())
        return reader.source
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{place}:{mark.line + 1}" if number_lines and mark else place
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "" if number_lines else "; quote values that hold YAML signs, such as 'key=\"*.jsonl\"'"
        raise RecipeError(f"{where}: not valid YAML: {reason}{hint}") from None
    except RecursionError:
        raise RecipeError(f"{place}: lists and mappings are nested too deeply for a recipe") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise RecipeError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None


def text_fault(text: str) -> str | None:
    """The reason why a text is invalid as a name, path or setting; None if it is valid."""
    found = _UNPRINTABLE.search(text)
    return f"holds the character U+{ord(found[0]):04X}, which is not allowed in text; remove it" if found else None


class _Reader:
    """Builds plain values from YAML nodes, keeping the line of each."""

    def __init__(self, loader: _Loader, place: str, number_lines: bool) -> None:
        self.loader = loader
        self.file = place
        self.number_lines = number_lines
        self.source = Source(None)
        self.pairs: dict[int, list[tuple[yaml.ScalarNode, yaml.Node]]] = {}
        self.merging: set[int] = set()
        self.open: set[int] = set()
        self.count = 0

    def at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}" if self.number_lines else self.file

    def spend(self, values: int, node: yaml.Node) -> None:
        """Count values: aliases and merge keys can expand a few lines to millions of values."""
        self.count += values
        if self.count > MOST_VALUES:
            raise RecipeError(f"{self.at(node)}: with its aliases the recipe has more than {MOST_VALUES:,} values")

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.spend(1, node)
        if path:  # a key's own line, where there is one
            self.source.places.setdefault(path, self.at(node))
        if len(path) > DEEPEST:
            raise RecipeError(f"{self.at(node)}: lists and mappings are nested too deeply for a recipe")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        self.check_tag(node, self.loader.resolve(type(node), None, True), path)
        if id(node) in self.open:
            raise RecipeError(f"{self.at(node)}: {dotted(path)}: an alias that contains itself")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        finally:
            self.open.remove(id(node))

    def check_tag(self, node: yaml.Node, plain: str, path: KeyPath) -> None:
        """Refuse tags: dates, bytes, sets and Python objects are not valid settings."""
        if node.tag not in (plain, _TEXT if isinstance(node, yaml.ScalarNode) else plain):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise RecipeError(
                f"{self.at(node)}: {dotted(path)}: the YAML tag {tag} is not allowed in a recipe; "
                "write the value plainly"
            )

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in self.merged(node, path):
            key = key_node.value
            self.source.places[(*path, key)] = self.at(key_node)
            data[key] = self.value(value_node, (*path, key))
        return data

    def merged(self, node: yaml.MappingNode, path: KeyPath) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        """The pairs of a mapping, first those from merge keys, each key once."""
        if id(node) in self.pairs:
            return self.pairs[id(node)]
        if id(node) in self.merging:
            raise RecipeError(f"{self.at(node)}: {dotted(path)}: an alias that contains itself")
        self.merging.add(id(node))
        own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        taken: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{self.at(key_node)}: a key must be plain text, not a list or mapping")
            if key_node.tag == _MERGE:
                others = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for other in others:
                    if not isinstance(other, yaml.MappingNode):
                        raise RecipeError(f"{self.at(key_node)}: << takes a mapping, or a list of mappings")
                    pairs = self.merged(other, path)
                    self.spend(len(pairs) + 1, key_node)
                    for pair in pairs:
                        taken.setdefault(pair[0].value, pair)
                continue
            key = key_node.value
            fault = text_fault(key)
            if fault is not None:
                raise RecipeError(f"{self.at(key_node)}: a key {fault}")
            self.check_tag(key_node, self.plain_tag(key_node), path)
            if key in own:
                text = f"given twice in one section, first on line {own[key][0].start_mark.line + 1}"
                self.source.problems.append(Problem(self.at(key_node), (*path, key), text))
            own[key] = (key_node, value_node)
        self.pairs[id(node)] = list((taken | own).values())
        return self.pairs[id(node)]

    def plain_tag(self, node: yaml.ScalarNode) -> str:
        """The type of a scalar without a tag: resolved by its form, or text if quoted."""
        return self.loader.resolve(yaml.ScalarNode, node.value, (True, False)) if node.style is None else _TEXT

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        self.check_tag(node, self.plain_tag(node), path)
        text, tag = node.value, node.tag
        try:
            if "${" in text:
                text = _from_environment(text)
                # An unquoted value is a number or a boolean after the substitution if it looks like one.
                tag = self.loader.resolve(yaml.ScalarNode, text, (True, False)) if node.style is None else _TEXT
            return _plain(text, tag)
        except ValueError as error:
            self.source.unreadable[path] = Problem(self.at(node), path, str(error))
            return None


def _from_environment(text: str) -> str:
    """The text with environment variables replaced by their values.

    Raises:
        ValueError: A variable is not set, or a reference is invalid.
    """
    faults: list[str] = []

    def substitute(match: re.Match[str]) -> str:
        reference = _ENVIRONMENT.fullmatch(match[1])
        if reference is None:
            faults.append(f"{match[0]} is not known; write ${{env:NAME}} or ${{env:NAME:default}}")
            return ""
        value = os.environ.get(reference[1], reference[2])
        if value is None:
            faults.append(
                f"the environment variable {reference[1]} is not set; export it, or give a default: "
                f"${{env:{reference[1]}:default}}"
            )
        elif "${" in value:
            faults.append(f"the environment variable {reference[1]} holds ${{ itself, which is not looked up again")
        return value or ""

    result = _INTERPOLATION.sub(substitute, text)
    if not faults and "${" in result:
        faults.append("has ${ without an end; write ${env:NAME} or ${env:NAME:default}")
    if faults:
        raise ValueError("; ".join(faults))
    return result


def _plain(text: str, tag: str) -> Any:
    """The value of a scalar.

    Raises:
        ValueError: It is out of range, or text with an invalid character.
    """
    kind = tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        digits = text.replace("_", "")
        if len(digits) > len(str(LARGEST)) + 1 or abs(int(digits)) > LARGEST:
            raise ValueError(
                f"a number of {len(digits.lstrip('+-'))} digits is out of range; whole numbers end at 2^63"
            )
        return int(digits)
    if kind == "float":
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            raise ValueError(f"expected a finite number, got {number}")
        return number
    fault = text_fault(text)
    if fault is not None:
        raise ValueError(fault)
    return text


def dump_yaml(value: Any) -> str:
    """YAML text that :func:`parse_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
