"""Regular expressions of a recipe or an adapter never keep a process busy for ever."""

from __future__ import annotations

import json
import time

import pytest

from sparsetrain.recipe.expressions import PATIENCE, matching

NAMES = [f"model.layers.{index}.self_attn.{name}_proj" for index in range(3) for name in "qkvo"]


def test_an_expression_matches_whole_names_as_re_does():
    assert matching(r".*layers\.[01]\..*(q|v)_proj", NAMES) == {n for n in NAMES if n[13] in "01" and n[-6] in "qv"}
    assert matching("layers", NAMES) == set()


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(.+)+#", "takes more than"),
        ("(.*)*#", "takes more than"),
        ("[", "is not a regular expression"),
        ("(" * 900 + ")" * 900, "nested"),
        (".*" * 1500, "is longer than 2000 characters"),
    ],
)
def test_one_that_backtracks_for_ever_is_refused_with_the_field(refuse, minimal, expression, reason):
    start = time.monotonic()
    message = refuse(minimal, f"lora.targets={json.dumps(expression)}")
    assert "targets" in message
    assert reason in message
    assert time.monotonic() - start < PATIENCE + 5
