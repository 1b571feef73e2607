from __future__ import annotations

import json

import pytest

from sparsetrain.methods.registry import METHODS
from sparsetrain.recipe import Recipe
from sparsetrain.recipe.describe import attention_facts, explained, json_schema
from sparsetrain.recipe.problems import field_paths, sections_in


def sections(section, seen=None):
    seen = {} if seen is None else seen
    if section not in seen:
        seen[section] = None
        for field in section.model_fields.values():
            for inner in sections_in(field.annotation):
                sections(inner, seen)
    return list(seen)


def test_every_field_of_every_section_is_described():
    bare = [
        f"{section.__name__}.{name}"
        for section in sections(Recipe)
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert bare == []
    assert all(section.__doc__ for section in sections(Recipe))


def test_the_schema_is_whole_json_and_knows_every_method():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {*Recipe.model_fields, "base"}
    methods = schema["properties"]["attention"]["anyOf"]
    names = {schema["$defs"][each["$ref"].rsplit("/", 1)[1]]["properties"]["method"]["const"] for each in methods}
    assert names == set(METHODS)

    def references(node):
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert {reference.rsplit("/", 1)[1] for reference in references(schema)} == set(schema["$defs"])


def test_the_schema_requires_nothing_because_a_base_may_give_it():
    assert '"required"' not in json.dumps(json_schema())


def test_the_listing_explains_every_field(load, minimal):
    text = explained(load(minimal).recipe)
    assert "# Peak learning rate.\n  lr: 2.0e-05\n" in text
    assert "    # Column that holds the text (form ``text``).\n      text_field: text\n" in text
    for path in field_paths(Recipe):
        assert f"{path[-1]}:" in text or path[0] in ("eval", "attention", "lora", "preference"), path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "power attention, 78.3% of causal pairs at 128 tokens in blocks of 16"),
        (["attention.method=full"], "full attention"),
        (["attention.dense_layers=[0,-1]"], "layers 0, -1 dense"),
        (["attention.dense_layers={count: 2, every: 7}"], "2 in every 7 layers dense"),
        (
            [
                "attention.dense_layers=[0,-1]",
                "model={architecture: {model_type: llama, num_hidden_layers: 6}, tokenizer: t}",
            ],
            "2 of 6 layers dense",
        ),
        # Blocks 0 to 7 read at most themselves and one of 1, 2 and 4 a layer: 8 blocks whole at the diagonal, and 7, 6
        # and 4 beside it.
        (
            ["attention={method: power, block: 16, window: 1, sinks: 0, split: layers, farthest: 4}"],
            f"power attention, {(8 * 136 + 256 * 17 / 3) / (128 * 129 / 2):.1%} of causal pairs at 128 tokens",
        ),
        (
            [
                "attention={method: power, block: 16, window: 1, sinks: 0, split: heads, farthest: 4}",
                "model={architecture: {model_type: llama, num_attention_heads: 3}, tokenizer: t}",
            ],
            f"power attention, {(8 * 136 + 256 * 17 / 3) / (128 * 129 / 2):.1%} of causal pairs at 128 tokens",
        ),
    ],
)
def test_attention_facts(load, minimal, overrides, expected):
    assert expected in attention_facts(load(minimal, *overrides).recipe)
