"""What the documentation of a tensor function says: shapes, what is raised, and where the mathematics is from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import sparsetrain_kernels
from sparsetrain_kernels import causal_selection, score_placement

SHAPE = re.compile(r"``[\w ]*\[.*\]``")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(package, name)
    for package in (sparsetrain_kernels, causal_selection, score_placement)
    for name in package.__all__
    if inspect.isfunction(getattr(package, name))
}
SAME_ARGUMENTS = {"block_pattern_attention_dense"}
"""Those of the function whose oracle it is, as it says."""
NO_PAPER = {"block_pattern_attention", "block_pattern_attention_dense", "document_positions"}
"""Patterns are not of one paper, and positions of none."""


def section(text: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", text, re.M)
    assert found, f"no section {title}"
    return inspect.cleandoc("\n" + found[1])


def arguments(text: str) -> dict[str, str]:
    """What is said of each argument; several may share an entry."""
    entries = re.split(r"^(\w+(?:, \w+)*): ", section(text, "Args"), flags=re.M)[1:]
    return {name: words for names, words in zip(entries[::2], entries[1::2]) for name in names.split(", ")}


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - SAME_ARGUMENTS))
def test_every_argument_is_described_and_tensors_have_shapes(name: str) -> None:
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    said = arguments(inspect.getdoc(FUNCTIONS[name]) or "")
    assert set(said) == set(parameters)
    for argument, parameter in parameters.items():
        if "Tensor" in str(parameter.annotation):
            assert SHAPE.search(said[argument]), f"{argument}: {said[argument]}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_result_has_shapes(name: str) -> None:
    if inspect.signature(FUNCTIONS[name]).return_annotation != "None":
        assert SHAPE.search(section(inspect.getdoc(FUNCTIONS[name]) or "", "Returns"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_raised_and_the_paper_are_named(name: str) -> None:
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    if name not in NO_PAPER:
        assert "Error" in section(text, "Raises")
        assert re.search(r"\d{4}\.\d{5}, (section|equation|Algorithm) ", text)
