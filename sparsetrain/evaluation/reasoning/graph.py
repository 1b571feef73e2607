"""Directed graphs, given edge by edge in random order, and questions about walks in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from random import Random

from sparsetrain.evaluation.reasoning.specs import OUT, PARENTS, GraphKind

Edge = tuple[str, str]

STARTS = 8
"""Nodes that are tried as the start of a search."""


@dataclass(frozen=True)
class GraphQuestion:
    """A graph, a question about it, and the nodes that are the answer."""

    edges: list[Edge]
    """In random order."""
    start: str
    """The node that is asked about."""
    answer: list[str]
    chance: float
    """Of a uniform guess: of one of the other nodes, or of so many of them as the answer has."""


def fewest_edges(kind: GraphKind, hops: int) -> int:
    """Edges below which there might be no such question."""
    return hops + 2 if kind == "walk" else OUT * (OUT ** (hops + 1) + 2)


def draw(kind: GraphKind, hops: int, edges: int, names: Sequence[str], random: Random) -> GraphQuestion:
    """A graph of about so many edges, and a question about it.

    Args:
        hops: steps of a walk, or depth of a search.
        names: at least as many as edges.
    """
    if kind == "walk":
        return _walk(hops, random.sample(names, edges), random)
    nodes = random.sample(names, edges // OUT)
    while True:
        drawn = [(node, other) for node in nodes for other in _others(nodes, node, random)]
        random.shuffle(drawn)
        if kind == "parents":
            answers = {node: found for node, found in _parents(drawn).items() if len(found) <= PARENTS}
        else:
            answers = {node: found for node in nodes[:STARTS] if (found := _at_depth(drawn, node, hops))}
        if answers:
            start = random.choice([*answers])
            answer = sorted(answers[start])
            return GraphQuestion(drawn, start, answer, 1 / comb(len(nodes) - 1, len(answer)))


def _walk(hops: int, nodes: list[str], random: Random) -> GraphQuestion:
    """One edge leaves every node, along a circle through all of them, so that no walk comes back earlier."""
    drawn = [*pairwise(nodes), (nodes[-1], nodes[0])]
    random.shuffle(drawn)
    return GraphQuestion(drawn, nodes[0], [nodes[hops]], 1 / (len(nodes) - 1))


def _others(nodes: list[str], node: str, random: Random) -> list[str]:
    """Different nodes that edges lead to from a node."""
    chosen: list[str] = []
    while len(chosen) < OUT:
        other = random.choice(nodes)
        if other != node and other not in chosen:
            chosen.append(other)
    return chosen


def _parents(edges: list[Edge]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for start, end in edges:
        found[end].add(start)
    return found


def _at_depth(edges: list[Edge], start: str, depth: int) -> set[str]:
    """Nodes whose shortest way from a node has so many edges."""
    ends: dict[str, list[str]] = defaultdict(list)
    for one, other in edges:
        ends[one].append(other)
    seen, level = {start}, {start}
    for _ in range(depth):
        level = {end for node in level for end in ends[node]} - seen
        seen |= level
    return level
