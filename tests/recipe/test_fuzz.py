"""Made-up recipes: each is read or refused in one message, and what is read can be written and read again."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import dump_recipe, load_recipe
from sparsetrain.recipe.problems import field_paths
from sparsetrain.recipe.schema import Recipe

SIGNS = [
    *"{}[]:,-?!&*#|>'\"%@`~= \n\t\0",
    "<<: *a",
    "&a",
    "*a",
    "!!binary ",
    "!!set ",
    "!!python/name:os ",
    "---\n",
    "...\n",
    "${env:HOME}",
    "${",
    ": ",
    "- ",
    "null",
    "1e999",
    "9" * 400,
    "0x1",
    "-0",
    ".nan",
    "\ud800",
    "\ufeff",
    "é",
    "😀",
    "base: run\n",
]
FIELDS = sorted({".".join(path) for path in field_paths(Recipe)} | {"data.sources.0.path", "attention.dense_layers.0"})
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**400, 1e308, 1e-320, -0.0, 0.5])
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=12) | st.sampled_from(["x" * 5000, "a.b", "../..", "~x"])
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def read_or_refused(path, overrides=()):
    try:
        recipe = load_recipe(path, overrides).recipe
    except RecipeError:
        return
    again = path.with_name("again.yaml")
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again).recipe == recipe


def test_a_recipe_with_signs_in_any_place_is_read_or_refused(fuzz, minimal, tmp_path):
    edits = st.lists(
        st.tuples(st.integers(0, len(minimal)), st.integers(0, 12), st.sampled_from(SIGNS) | st.text(max_size=4)),
        min_size=1,
        max_size=4,
    )

    def check(changes):
        text = minimal
        for start, length, new in changes:
            text = text[:start] + new + text[start + length :]
        (tmp_path / "run.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
        read_or_refused(tmp_path / "run.yaml")

    fuzz(edits, check)


def test_bytes_are_read_or_refused(fuzz, tmp_path):
    def check(content):
        (tmp_path / "run.yaml").write_bytes(content)
        read_or_refused(tmp_path / "run.yaml")

    fuzz(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-16")), check)


def test_any_value_of_any_field_is_read_or_refused(fuzz, minimal, tmp_path):
    (tmp_path / "run.yaml").write_text(minimal)
    settings = st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3)

    def check(given):
        read_or_refused(tmp_path / "run.yaml", [f"{field}={json.dumps(value)}" for field, value in given])

    fuzz(settings, check)


def test_any_words_of_a_command_line_are_read_or_refused(fuzz, minimal, tmp_path):
    (tmp_path / "run.yaml").write_text(minimal)
    parts = st.sampled_from([*FIELDS, "²", "0", "base", "version", ""]) | st.text(max_size=6)
    words = st.lists(st.tuples(parts, st.sampled_from(SIGNS) | st.text(max_size=8)).map("=".join), max_size=3)
    fuzz(words, lambda given: read_or_refused(tmp_path / "run.yaml", given))
