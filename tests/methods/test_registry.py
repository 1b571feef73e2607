"""The ``attention`` section: the paper's defaults, strict parsing, readable errors, and no torch at import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import DenseLayerRule
from sparsetrain.methods.registry import METHODS, AttentionConfig, parse_attention


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_chosen_by_its_name_alone(method):
    config = parse_attention({"method": method})
    assert type(config) is METHODS[method]
    assert TypeAdapter(AttentionConfig).validate_python({"method": method}) == config
    assert parse_attention(config.model_dump(mode="json")) == config
    assert parse_attention(config) is config


def test_the_registry_and_the_recipe_know_the_same_methods():
    mapping = TypeAdapter(AttentionConfig).json_schema()["discriminator"]["mapping"]
    assert mapping.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("method", "query_block", "key_blocks"),
    [
        ("power", 40, (0, 8, 24, 32, 36, 37, 38, 39, 40)),
        ("sliding", 40, (0, 32, 33, 34, 35, 36, 37, 38, 39, 40)),
        ("stride", 40, (0, 8, 35, 36, 37, 38, 39, 40)),
        ("dilated", 40, (22, 24, 26, 28, 30, 32, 34, 36, 38, 40)),
        ("longnet", 40, (0, 8, 16, 24, 32, 34, 36, 38, 40)),
        ("ruler", 40, (0, 15, 31, 35, 36, 37, 38, 39, 40)),
    ],
)
def test_the_defaults_are_the_papers(method, query_block, key_blocks):
    pattern = parse_attention({"method": method}).pattern()
    assert pattern.block == 256
    assert pattern.key_blocks(query_block) == key_blocks


@pytest.mark.parametrize(
    ("section", "query_block", "key_blocks"),
    [
        ({"method": "power", "window": 2, "sinks": 2}, 9, (0, 1, 5, 7, 8, 9)),
        ({"method": "sliding", "window": 2, "sinks": 0}, 9, (8, 9)),
        ({"method": "stride", "window": 1, "sinks": 0, "stride": 4}, 9, (1, 5, 9)),
        ({"method": "dilated", "window": 3, "dilation": 3}, 9, (3, 6, 9)),
        ({"method": "longnet", "segments": [[2, 1], [8, 4]]}, 12, (8, 12)),
        ({"method": "power", "window": 1, "sinks": 0, "base": 4}, 20, (4, 8, 12, 16, 17, 18, 19, 20)),
        ({"method": "power", "window": 2, "sinks": 0, "farthest": 5}, 20, (16, 18, 19, 20)),
        ({"method": "ruler", "window": 1, "sinks": 0, "keep": 1, "levels": 2}, 18, (15, 17, 18)),
    ],
)
def test_the_parameters_reach_the_pattern(section, query_block, key_blocks):
    pattern = parse_attention({**section, "block": 16}).pattern()
    assert pattern.block == 16
    assert pattern.key_blocks(query_block) == key_blocks


def test_longnet_shifts_by_key_value_head_only_when_asked():
    section = {"method": "longnet", "segments": [[2, 1], [8, 4]]}
    plain, shifted = (
        parse_attention({**section, "head_shift": shift}).pattern(num_kv_heads=4) for shift in (False, True)
    )
    assert (plain.per_head, shifted.per_head) == (False, True)
    assert plain.key_blocks(13, head=1) == (12, 13)
    assert shifted.key_blocks(13, head=1) == (9, 12, 13)


def test_ranks_do_not_share_heads_that_read_by_their_number():
    power = {"method": "power", "farthest": 64}
    by_head, by_layer = (parse_attention({**power, "split": split}) for split in ("heads", "layers"))
    assert by_head.heads_fault(8, 2) == (
        "attention.method=power gives each head its own pattern by its number in the model; set it to 1, or "
        "attention.split: layers"
    )
    assert by_layer.heads_fault(8, 2) is None


def test_full_attention_has_no_pattern():
    assert parse_attention({"method": "full"}).pattern() is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "there is no None. Choose from full, power"),
        ({"method": "powr"}, "did you mean power"),
        ({"method": "power", "blok": 4}, r"method power.*'blok', did you mean block\? .*window"),
        ({"method": "power", "block": 0}, "block=0: .*greater than 0"),
        ({"method": "power", "window": 2.5}, "window=2.5"),
        ({"method": "power", "base": 1}, "base=1"),
        ({"method": "power", "split": "layers"}, "split=layers needs farthest.*farthest: 64 for 32,768 tokens"),
        ({"method": "power", "window": 5, "farthest": 7}, "farthest=7 leaves no block to read behind a window of 5"),
        ({"method": "ruler", "levels": 11}, "levels=11"),
        ({"method": "sliding", "sinks": -1}, "sinks=-1: .*greater than or equal to 0"),
        ({"method": "sliding", "stride": 4}, "'stride'"),
        ({"method": "full", "block": 256}, "'block'"),
        ({"method": "longnet", "segments": [[4, 8]]}, "rate may not exceed"),
        ({"method": "longnet", "segments": [[4, 2]]}, "needs rate 1"),
        ({"method": "longnet", "segments": []}, "segments"),
        ({"method": "power", "dense_layers": {"count": 2}}, "every"),
        ({"method": "recycled", "every": 0}, r"every=0: Input should be greater than 0; every=0: "),
        ({"method": "recycled", "every": [8, 0]}, r"(recycled\): |; )every\.1=0: Input should be greater than 0"),
        ({"method": "power", "dense_layers": {"count": 2}}, r"dense_layers\.every=.*: Field required"),
    ],
)
def test_mistakes_are_explained(section, message):
    with pytest.raises(ModelError, match=message):
        parse_attention(section)


@pytest.mark.parametrize("section", [None, "sparsek"])
def test_what_is_no_mapping_is_told_so(section):
    with pytest.raises(ModelError, match="is not a mapping such as"):
        parse_attention(section)


def test_dense_layers_by_rule_and_by_list():
    assert DenseLayerRule(count=2, every=7).layers(14) == {0, 1, 7, 8}
    assert DenseLayerRule(count=2, every=7, first=3).layers(14) == {3, 4, 10, 11}
    rule = parse_attention({"method": "power", "dense_layers": {"count": 1, "every": 4}})
    assert rule.resolve_dense_layers(6) == {0, 4}
    listed = parse_attention({"method": "power", "dense_layers": [0, -1]})
    assert listed.resolve_dense_layers(6) == {0, 5}


@pytest.mark.parametrize("layer", [6, -7])
def test_a_dense_layer_beyond_the_model_is_refused(layer):
    config = parse_attention({"method": "power", "dense_layers": [layer]})
    with pytest.raises(ModelError, match=rf"layer {layer}, but the model has 6 layers \(0 to 5\)"):
        config.resolve_dense_layers(6)


def test_every_parameter_is_described():
    for config in METHODS.values():
        for name, field in config.model_fields.items():
            assert field.description or name == "method", (config, name)


def test_importing_the_methods_loads_no_torch():
    code = (
        "import sys, sparsetrain, sparsetrain.methods.registry as registry\n"
        "registry.parse_attention({'method': 'power'})\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
