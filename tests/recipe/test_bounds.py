"""Numbers of a recipe: none makes a command count for ever, and those that are legitimate are computed, not counted."""

from __future__ import annotations

import json
import time

import pytest

from sparsetrain.cli import main
from sparsetrain.methods.ruler import RulerPattern
from sparsetrain.patterns import (
    DilatedPattern,
    FullPattern,
    LongNetPattern,
    PowerPattern,
    SlidingPattern,
    StridePattern,
)
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.problems import field_paths
from sparsetrain.recipe.schema import Recipe


@pytest.fixture
def within():
    """Fail what takes longer than a person waits."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("value", ["1000000000", "1000000000000000", "9000000000000000000"])
@pytest.mark.parametrize(
    "override",
    [
        "sequence.length",
        "attention.block",
        "attention.window",
        "attention.sinks",
        "train.micro_batch",
        "train.global_batch_sequences",
        "sequence.parallel",
        "data.num_workers",
        "lora.rank",
        "data.sources.0.keys",
        "eval.tasks.passkey={lengths: [64]} eval.tasks.passkey.trials",
        "eval.tasks.passkey={lengths: [64]} eval.tasks.passkey.depths",
        "eval.tasks.perplexity.source={path: x} eval.tasks.perplexity.lengths.0",
        "attention={method: longnet, segments: [[8, 1]]} attention.segments.0.0",
        "attention={method: sparsek} attention.topk",
        "train.lr",
    ],
)
def test_a_number_beyond_sense_is_refused_with_the_reason(refuse, minimal, within, override, value):
    *before, field = override.rsplit(" ", 1)
    before = before[0].split(" eval.", 1)[:1] if before else []
    message = refuse(
        minimal + "eval: {tasks: [{task: perplexity, lengths: [64], source: {path: x}}]}\n", *before, f"{field}={value}"
    )
    assert "of at most" in message
    assert ": expected a number" in message.replace("\n", "")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.config_overrides.num_hidden_layers=1000000000", "model.config_overrides.num_hidden_layers"),
        ("model.config_overrides.num_attention_heads=1000000000000000", "model.config_overrides.num_attention_heads"),
        ("model.config_overrides.text_config.num_experts=100000", "model.config_overrides.text_config.num_experts"),
        ("model.config_overrides.vocab_size=1000000000000000", "model.config_overrides.vocab_size"),
    ],
)
def test_a_model_of_sizes_beyond_sense_is_refused(refuse, minimal, within, override, field):
    assert f"{field}: expected a number of at most" in refuse(minimal, override, "sequence.parallel=4")


def test_blocks_too_many_to_list_are_refused(refuse, minimal, within):
    message = refuse(minimal, "sequence.length=100000000")
    assert "attention.block: a row of 100,000,000 tokens would be 6,250,000 blocks of 16" in message


def test_segments_that_never_repeat_are_refused(refuse, minimal, within):
    message = refuse(minimal, "attention={method: longnet, segments: [[1021, 1], [1019, 1], [1013, 1]]}")
    assert "attention: segments: the pattern repeats only every 1,053," in message


def test_long_runs_are_legitimate_and_answered_at_once(minimal, tmp_path, capsys, within):
    file = tmp_path / "run.yaml"
    file.write_text(minimal.replace("path: corpus.jsonl", "synthetic: passkey"))
    assert main(["recipe", "validate", str(file), "train.tokens=1e15", "sequence.length=16777216"]) == 0
    assert "of causal pairs at 16,777,216 tokens" in capsys.readouterr().out
    overrides = ["train.global_batch_sequences=16777215", "train.micro_batch=65536"]
    assert main(["recipe", "validate", str(file), *overrides]) == 2
    assert main(["recipe", "validate", str(file), "sequence.parallel=7", "--ranks", "131072"]) == 2
    assert main(["recipe", "validate", str(file), "--ranks", "1000000000000"]) == 2


@pytest.mark.parametrize(
    "pattern",
    [
        FullPattern(block=3),
        SlidingPattern(block=3, window=4, sinks=2),
        SlidingPattern(block=3, window=400, sinks=300),
        PowerPattern(block=3, window=3, sinks=1),
        PowerPattern(block=3, window=1, sinks=0),
        StridePattern(block=3, window=2, sinks=3, stride=4),
        DilatedPattern(block=3, window=4, dilation=3),
        LongNetPattern(block=3, segments=((2, 1), (4, 2), (8, 4)), head_shift=True, num_heads=3),
        LongNetPattern(block=3, segments=((3, 1), (5, 2))),
        PowerPattern(block=3, window=3, sinks=1, base=4, farthest=48),
        RulerPattern(block=3, window=2, sinks=1, keep=2, levels=3),
        RulerPattern(block=3, window=9, sinks=20, keep=1, levels=5),
    ],
    ids=repr,
)
def test_what_is_computed_is_what_would_be_counted(pattern):
    for head in pattern.heads:
        for blocks in (0, 1, 2, 5, 31, 70):
            assert pattern.listed(blocks, head) == sum(len(pattern.key_blocks(t, head)) for t in range(blocks))
        for length in (1, 2, 3, 4, 50, 91):
            mask = pattern.token_mask(length, length, head=head)
            assert pattern.density(length, head) == mask.sum() / (length * (length + 1) / 2)


def test_every_whole_number_of_the_schema_has_a_bound(load, minimal):
    """A new field without one is a way to hang a run."""
    from sparsetrain.recipe.describe import json_schema

    def unbounded(node, path):
        if isinstance(node, dict):
            if node.get("type") == "integer" and not {"maximum", "exclusiveMaximum", "enum", "const"} & node.keys():
                yield path
            for key, value in node.items():
                yield from unbounded(value, f"{path}.{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from unbounded(value, f"{path}.{index}")

    allowed = ("version", "dense_layers", "DenseLayerRule")  # counted against the layers of the model
    assert [path for path in unbounded(json_schema(), "") if not any(name in path for name in allowed)] == []
    assert list(field_paths(Recipe))
    assert load_recipe("quickstart")


def test_a_config_that_is_given_to_a_plan_is_bounded_too(minimal, tmp_path, capsys, within):
    (tmp_path / "run.yaml").write_text(minimal.replace("path: corpus.jsonl", "synthetic: passkey"))
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 10**12, **sizes}))
    for file in (str(config), "/dev/zero"):
        assert main(["plan", str(tmp_path / "run.yaml"), "--config", file]) == 2
    assert "num_hidden_layers=1000000000000 is above 4,096" in capsys.readouterr().err
