"""YAML with a memory: every value knows the line it came from, and plain scalars mean what they look like."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from sparsetrain.errors import RecipeError

KeyPath = tuple[str | int, ...]

OVERRIDE = "command line override"
"""How the place of a value from the command line begins."""

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
    """One mistake in a recipe: where it is written, which field, what is wrong."""

    place: str
    path: KeyPath
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.path)}: {self.text}" if self.path else f"{self.place}: {self.text}"


@dataclass
class Source:
    """A parsed recipe: plain values, the place of each, and the mistakes found on the way."""

    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unset: dict[KeyPath, Problem] = field(default_factory=dict)
    """Values waiting for an environment variable that does not exist. Replacing the value settles it."""

    def place(self, path: KeyPath) -> str:
        """``file:line`` of a value, or of the nearest section around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def settle(self, path: KeyPath) -> None:
        """Forget the missing variables of a value that is about to be replaced."""
        for known in [known for known in self.unset if known[: len(path)] == path]:
            del self.unset[known]


def dotted(path: KeyPath) -> str:
    """``("data", "sources", 0)`` as ``data.sources.0``."""
    return ".".join(str(part) for part in path)


def parse_yaml(text: str, place: str, *, number_lines: bool = True) -> Source:
    """Parse YAML into plain values and their places.

    Args:
        text: the YAML.
        place: what errors call it: the file's path.
        number_lines: add ``:line`` to the place.

    Raises:
        RecipeError: the text is not YAML, or holds a tag or an alias that plain settings do not have.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _Reader(loader, place, number_lines)
        reader.source.places[()] = f"{place}:1" if number_lines else place
        if node is not None:
            reader.source.data = reader.value(node, (), ())
        return reader.source
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{place}:{mark.line + 1}" if number_lines and mark else place
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "" if number_lines else "; quote values that hold YAML signs, such as 'key=\"*.jsonl\"'"
        raise RecipeError(f"{where}: not valid YAML: {reason}{hint}") from None
    except RecursionError:
        raise RecipeError(f"{place}: lists and mappings are nested too deeply for a recipe") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None


class _Reader:
    """Builds plain values from YAML nodes, keeping the line of each."""

    def __init__(self, loader: _Loader, place: str, number_lines: bool) -> None:
        self.loader = loader
        self.file = place
        self.number_lines = number_lines
        self.source = Source(None)
        self.merged: set[int] = set()

    def at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}" if self.number_lines else self.file

    def value(self, node: yaml.Node, path: KeyPath, parents: tuple[int, ...]) -> Any:
        if path:  # a key's own line, where there is one
            self.source.places.setdefault(path, self.at(node))
        if id(node) in parents:
            raise RecipeError(f"{self.at(node)}: {dotted(path)}: an alias that contains itself")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if node.tag != self.loader.resolve(type(node), None, True):
            raise RecipeError(f"{self.at(node)}: {dotted(path)}: the YAML tag {node.tag} is not allowed in a recipe")
        parents = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, parents)
        return [self.value(item, (*path, index), parents) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: KeyPath, parents: tuple[int, ...]) -> dict[str, Any]:
        if id(node) not in self.merged:
            self.refuse_duplicates(node, path)
            self.loader.flatten_mapping(node)
            self.merged.add(id(node))
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            self.source.places[(*path, key)] = self.at(key_node)
            data[key] = self.value(value_node, (*path, key), parents)
        return data

    def refuse_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, yaml.Node] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{self.at(key_node)}: a key must be plain text, not a list or mapping")
            if key_node.value in first:
                text = f"given twice in one section, first on line {first[key_node.value].start_mark.line + 1}"
                self.source.problems.append(Problem(self.at(key_node), (*path, key_node.value), text))
            else:
                first[key_node.value] = key_node

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        if "${" not in node.value:
            return self.loader.construct_object(node)
        missing: list[str] = []

        def substitute(match: re.Match[str]) -> str:
            reference = _ENVIRONMENT.fullmatch(match[1])
            if reference is None:
                missing.append(f"{match[0]} is not known; write ${{env:NAME}} or ${{env:NAME:default}}")
                return ""
            value = os.environ.get(reference[1], reference[2])
            if value is None:
                missing.append(
                    f"the environment variable {reference[1]} is not set; export it, or give a default: "
                    f"${{env:{reference[1]}:default}}"
                )
            return value or ""

        text = _INTERPOLATION.sub(substitute, node.value)
        if missing:
            self.source.unset[path] = Problem(self.at(node), path, "; ".join(missing))
            return None
        if node.style is not None:
            return text
        # An unquoted value is a number or a boolean after the substitution if it looks like one.
        tag = self.loader.resolve(yaml.ScalarNode, text, (True, False))
        return self.loader.construct_object(yaml.ScalarNode(tag, text))


def dump_yaml(value: Any) -> str:
    """YAML text that :func:`parse_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
