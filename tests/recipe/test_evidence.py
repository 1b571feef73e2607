"""The small experiments: recipes that load, one budget of keys for every method, and a table of what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from sparsetrain.recipes.evidence.run import Outcome, main, methods, table, train

from sparsetrain.cli.entry import run_script
from sparsetrain.errors import TrainingError
from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

FOLDER = recipes_folder() / "evidence"
RECALL = [FOLDER / "recall.yaml", FOLDER / "recall-finetune.yaml"]
TASKS = [*RECALL, FOLDER / "needles.yaml", FOLDER / "text.yaml"]


def test_every_recipe_is_valid():
    for file in FOLDER.glob("*.yaml"):
        assert load_recipe(file).notes == []


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_every_method_reads_as_many_keys(file):
    recipe = load_recipe(file).recipe
    attention = recipe.attention
    assert isinstance(attention, SparseKConfig)
    budget = attention.sinks + attention.topk + attention.window
    for name, settings in methods(recipe, ["value", "log"]).items():
        method = load_recipe(file, settings).recipe.attention
        if name == "sliding":
            pattern = method.pattern()
            least = (pattern.window - 1 + pattern.sinks) * pattern.block + 1
            assert budget <= least + pattern.block - 1 <= budget + 2 * pattern.block
        elif name != "full":
            assert method.sinks + method.topk + method.window == budget


def test_every_scorer_is_measured_with_every_gate():
    recipe = load_recipe(RECALL[1]).recipe
    gates = ["value", "log"]
    for scorer in ("learned", "scorers alone", "frozen", "detached", "window and random keys"):
        for gate in gates:
            settings = methods(recipe, gates)[f"{scorer}, gate {gate}"]
            assert load_recipe(RECALL[1], settings).recipe.attention.gate == gate


def test_the_scorers_are_trained_alone_where_there_is_a_model_to_train_them_for():
    settings = {file.stem: methods(load_recipe(file).recipe, ["value"]) for file in TASKS}
    alone = [name for name in settings if "scorers alone, gate value" in settings[name]]
    assert alone == ["recall-finetune", "needles", "text"]


def test_recall_is_measured_where_the_window_alone_finds_nothing():
    for file in RECALL:
        recipe = load_recipe(file).recipe
        asked = recipe.eval.by_name["recall"].source
        pairs = 2 * asked.keys
        assert recipe.attention.topk >= pairs
        assert min(asked.lengths) // 2 - pairs > recipe.attention.window, "pairs end before the questions' window"


def test_the_table_has_a_row_a_method_and_columns_for_each_seed():
    outcomes = [
        Outcome("full", 2, {"loss": 2.0}, {"answers found": 0.99, "loss": 0.02}, 10.0),
        Outcome("full", 5, {"loss": 2.5}, {"answers found": 0.95, "loss": 0.05}, 20.0),
        Outcome("sliding", 2, {}, {"answers found": 0.05, "loss": 3.0}, 4.0),
        Outcome("sliding", 5, {}, {"answers found": 0.1, "loss": 2.5}, 4.0),
    ]
    assert table(outcomes).splitlines() == [
        "| method | answers found, seed 2 | answers found, seed 5 | loss, seed 2 | loss, seed 5 | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| full | 99.0% | 95.0% | 2.000 -> 0.020 | 2.500 -> 0.050 | 15 |",
        "| sliding | 5.0% | 10.0% | 3.000 | 2.500 | 4 |",
    ]


def test_the_runner_trains_writes_its_table_and_repeats_nothing(forked, tmp_path):
    settings = ["train.steps=1", "train.warmup=0", "train.micro_batch=1", "eval.tasks.recall.documents=2"]
    for _ in range(2):
        main(
            "recall",
            settings,
            seed=[3],
            parallel=1,
            gate=None,
            only=["window and random keys, gate straight"],
            out=tmp_path,
        )
        (log,) = tmp_path.glob("*.txt")
        written = log.stat().st_mtime_ns
    (outcome,) = json.loads((tmp_path / "table.json").read_text())
    assert (outcome["method"], outcome["seed"]) == ("window and random keys, gate straight", 3)
    assert list(outcome["after"]) == ["answers found", "loss"]
    assert "| window and random keys, gate straight |" in (tmp_path / "table.md").read_text()
    assert log.stat().st_mtime_ns == written
    assert Path(tmp_path / "window-and-random-keys-gate-straight-3/metrics.jsonl").exists()


def test_a_script_tells_mistakes_as_the_command_line_does(monkeypatch, capsys):
    for arguments, told in (
        (["nosuch"], "error: there is no recipe nosuch; `sparsetrain recipe list` shows what is shipped\n"),
        (["recall", "train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
        (["recall", "--parallel", "0"], "--parallel"),
    ):
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert (ended.value.code, told in capsys.readouterr().err) == (2, True)
    for file in FOLDER.glob("*.py"):
        assert "typer.run(" not in file.read_text()


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    """Asked to stop, a run saves a checkpoint and exits with 0, before anything was measured."""
    folder = tmp_path / "full-0"
    folder.mkdir()
    monkeypatch.setattr("subprocess.run", lambda command, **_: CompletedProcess(command, 0))
    for _ in range(2):
        with pytest.raises(TrainingError, match="full, seed 0 was stopped; the same command continues it"):
            train(RECALL[0], "full", 0, [], folder)
