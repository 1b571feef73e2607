"""Losses of a text, compared with those of another model on the same tokens."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch
from rich.console import Console

from sparsetrain.evaluation.report import print_results, read_results, write_report
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.perplexity import PerplexitySection
from sparsetrain.evaluation.text.losses import GROUPS, Losses
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.source_section import DataSource
from sparsetrain.world import World

BUCKETS = ("8 to 15", "128 to 255")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [10 * GROUPS, 5])
def test_a_difference_has_the_error_of_the_mean_of_paired_stretches(tokens):
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 5, tokens)
    mine, theirs = Losses.of(hard + rng.normal(0.1, 0.2, tokens)), Losses.of(hard)
    mean, error = mine.difference(theirs)
    size = tokens / len(mine.sums)
    pairs = [(left - right) / size for left, right in zip(mine.sums, theirs.sums, strict=True)]
    assert mean == pytest.approx(statistics.fmean(pairs))
    assert error == pytest.approx(statistics.stdev(pairs) / math.sqrt(len(pairs)))
    assert error < 0.2, "how hard the tokens are cancels out"


def test_what_cannot_be_said_is_nan_and_survives_json():
    assert math.isnan(Losses.of(np.array([])).mean())
    one = Losses.of(np.array([2.0]))
    assert (one.mean(), math.isnan(one.difference(one)[1])) == (2.0, True)
    diverged = Losses.of(np.array([1.0, math.inf]))
    assert diverged.perplexity() == math.inf
    assert Losses.model_validate_json(diverged.model_dump_json()) == diverged
    assert Losses.of(np.array([800.0])).perplexity() == math.inf


def test_rows_are_compared_with_the_first_on_the_same_tokens(tiny_model, byte_tokenizer, tmp_path):
    text = tmp_path / "held_out.txt"
    text.write_text("".join(f"It was {number} years ago, and {number * 7} days. " for number in range(60)))
    source = DataSource(path=str(text))

    def measured(length):
        section = EvalSection(tasks=[PerplexitySection(lengths=[64, length], source=source, tokens=1024)])
        return evaluate(tiny_model, byte_tokenizer, section, ALONE)

    results = {"full, before": measured(256)}
    sparsify(tiny_model, {"method": "sliding", "block": 16, "window": 1, "sinks": 0})
    results |= {"sliding, before": measured(256), "sliding, shorter": measured(128)}
    report = write_report(results, tmp_path, title="three").read_text()
    assert read_results(tmp_path) == results
    dense, sparse = (results[label].tasks["perplexity"] for label in ("full, before", "sliding, before"))
    mean, error = sparse.losses[256].difference(dense.losses[256])
    assert mean == pytest.approx(math.log(sparse.perplexity[256] / dense.perplexity[256]))
    title = "### Difference from full, before in nats a token, ± standard error, paired over stretches of the text\n\n"
    rows = report.split(title)[1].split("\n\n")[0].splitlines()
    assert rows[0] == "|  | 64 | 256 | from position 240 |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| sliding, before"], "other windows are not compared"
    assert f"| {mean:+.4f} ± {error:.4f} |" in rows[2]
    assert "### Loss by position in windows of 256 tokens (nats)" in report
    assert "| tokens before | tokens | full, before | sliding, before | difference |\n" in report
    early, late = (next(row for row in report.splitlines() if row.startswith(f"| {name} | ")) for name in BUCKETS)
    assert early.startswith("| 8 to 15 | 32 |")
    assert early.endswith(" | 0.0000 ± 0.0000 |"), "the window still holds all of them"
    assert late.startswith("| 128 to 255 | 512 |")
    assert late.count("±") == 1
    assert "### What was scored from full, before on\n\n| window | stride | windows | tokens scored |" in report
    assert "| 256 | none | 4 | 1,020 | 128 | no | joined | TokenizersBackend (257 tokens) |" in report
    assert f"Text: {text}, documents joined, each ended by EOS. Windows do not overlap" in report


def test_what_was_scored_is_printed_beside_the_number(tiny_model, byte_tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": "2 + 2 =", "completion": " four"}) + "\n" for _ in range(40)))
    task = PerplexitySection(lengths=[64], source=DataSource(path=str(path)), tokens=500, stride=32)
    console = Console(width=150, record=True)
    print_results({"full": evaluate(tiny_model, byte_tokenizer, EvalSection(tasks=[task]), ALONE)}, console)
    printed = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "What was scored" in printed
    assert any(line.startswith("64 32 15 ") and "(targets)" in line for line in printed)
