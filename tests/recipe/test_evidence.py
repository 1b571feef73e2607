"""The small experiments: recipes that load, one budget of keys for every method, and a table of what they found."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from sparsetrain.recipes.evidence.run import Outcome, main, methods, table, train

from sparsetrain.methods.sparsek import SparseKConfig
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

FOLDER = recipes_folder() / "evidence"
TASKS = [FOLDER / "recall.yaml", FOLDER / "marked.yaml"]


def test_every_recipe_is_valid():
    for file in FOLDER.glob("*.yaml"):
        assert load_recipe(file).notes == []


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_every_method_reads_as_many_keys(file):
    attention = load_recipe(file).recipe.attention
    assert isinstance(attention, SparseKConfig)
    budget = attention.sinks + attention.topk + attention.window
    for name, settings in methods(attention, ["value", "log"]).items():
        method = load_recipe(file, settings).recipe.attention
        if name == "sliding":
            pattern = method.pattern()
            least = (pattern.window - 1 + pattern.sinks) * pattern.block + 1
            assert budget <= least + pattern.block - 1 <= budget + 2 * pattern.block
        elif name != "full":
            assert method.sinks + method.topk + method.window == budget
    assert load_recipe(file, methods(attention, ["log"])["learned, gate log"]).recipe.attention.gate == "log"


def test_recall_is_measured_where_the_window_alone_finds_nothing():
    for file in TASKS:
        recipe = load_recipe(file).recipe
        asked = recipe.eval.recall.source
        pairs = 2 * asked.keys
        assert recipe.attention.topk >= pairs
        assert min(asked.lengths) // 2 - pairs > recipe.attention.window, "pairs end before the questions' window"


def test_the_table_has_a_row_a_method_and_columns_for_each_seed():
    outcomes = [
        Outcome("full", 0, 100, 0.99, 0.02, 10.0),
        Outcome("full", 1, 100, 0.95, 0.05, 20.0),
        Outcome("sliding", 0, 100, 0.05, 3.0, 4.0),
        Outcome("sliding", 1, 100, 0.1, 2.5, 4.0),
    ]
    assert table(outcomes).splitlines() == [
        "| method | answers found, seed 0 | answers found, seed 1 | loss, seed 0 | loss, seed 1 | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| full | 99.0% | 95.0% | 0.020 | 0.050 | 15 |",
        "| sliding | 5.0% | 10.0% | 3.000 | 2.500 | 4 |",
    ]


def test_the_runner_trains_writes_its_table_and_repeats_nothing(tmp_path):
    settings = ["train.steps=1", "train.warmup=0", "train.micro_batch=1", "eval.recall.documents=2"]
    for _ in range(2):
        main("recall", settings, seeds=1, parallel=1, gate=None, only=["window and random keys"], out=tmp_path)
        (log,) = tmp_path.glob("*.txt")
        written = log.stat().st_mtime_ns
    (outcome,) = json.loads((tmp_path / "table.json").read_text())
    assert (outcome["method"], outcome["answers"]) == ("window and random keys", 16)
    assert "| window and random keys |" in (tmp_path / "table.md").read_text()
    assert log.stat().st_mtime_ns == written
    assert Path(tmp_path / "window-and-random-keys-0/metrics.jsonl").exists()


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    """Asked to stop, a run saves a checkpoint and exits with 0, before anything was measured."""
    folder = tmp_path / "full-0"
    folder.mkdir()
    monkeypatch.setattr("subprocess.run", lambda command, **_: CompletedProcess(command, 0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="full, seed 0 was stopped; the same command continues it"):
            train(TASKS[0], "full", 0, [], folder)
