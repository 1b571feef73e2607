"""A run measures its trained model in other ways at its end, as its recipe asks."""

from __future__ import annotations

import json

import pytest

from sparsetrain.cli import main
from sparsetrain.recipe import load_recipe

TASKS = "tasks: [{task: passkey, lengths: [128], depths: 1, trials: 2, digits: 1}]"


def test_rows_are_measured_behind_the_model_as_it_is(tmp_path, tiny, run_folder):
    run = run_folder(tmp_path / "run")
    source = f"source: {{path: {tiny.parent / 'corpus.jsonl'}}}"
    tasks = f"tasks: [{{task: perplexity, lengths: [128], tokens: 256, {source}}}]"
    rows = "rows: [{attention: dense}, {attention: {method: sliding, block: 16, window: 1}}]"
    assert main(["run", str(tiny), f"eval={{at_start: false, {rows}, {tasks}}}", "--output", str(run.path)]) == 0
    assert "evaluations: 3 after it; each of 2 forward passes (perplexity 2)" in (run.path / "run.log").read_text()
    results = json.loads((run.path / "evaluation.json").read_text())
    others = [": dense", ": sliding block=16 window=1"]
    assert list(results) == ["power, after", *(f"power, after{other}" for other in others)]
    assert len({result["tasks"]["perplexity"]["perplexity"]["128"] for result in results.values()}) == 3
    assert "power, after: dense" in (run.path / "report.html").read_text()
    record = json.loads((run.path / "final/config.json").read_text())["sparsetrain"]
    assert record["attention"]["method"] == "power"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("[{attention: powr}]", "eval.rows.0: attention powr is not known; give trained, dense, a method"),
        ("[{attention: {method: power, blok: 3}}]", "there is no 'blok', did you mean block?"),
        ("[{decode: twilit}]", "decode=twilit is not known"),
        ("[{attention: trained}]", "trained and recorded is the model itself"),
        ("[{attention: dense}, {attention: dense}]", "dense is there 2 times; give it once"),
        ("[{attention: sparsek}]", "eval.rows.0.attention: sparsek adds modules, which were not trained here"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(tmp_path, tiny, capsys, rows, said):
    assert main(["run", str(tiny), f"eval={{rows: {rows}, {TASKS}}}", "--output", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_row_without_an_evaluation_is_refused(tmp_path, tiny, capsys):
    given = f"eval={{at_end: false, rows: [{{attention: dense}}], {TASKS}}}"
    assert main(["run", str(tiny), given, "--output", str(tmp_path / "run")]) == 2
    assert "eval.rows: rows are measured at the end of a run, and eval.at_end is false" in capsys.readouterr().err


def test_a_row_that_the_model_cannot_take_is_refused_before_training(tmp_path, tiny, capsys):
    tasks = "tasks: [{task: multi_turn, lengths: [1900]}]"
    given = f"eval={{at_start: false, rows: [{{decode: quest}}], {tasks}}}"
    assert main(["run", str(tiny), given, "attention.dense_layers=[]", "--output", str(tmp_path / "run")]) == 2
    assert "eval.rows.0: " in capsys.readouterr().err


def test_a_decode_setting_that_no_task_follows_is_noted(tiny):
    notes = load_recipe(tiny, [f"eval={{rows: [{{decode: twilight}}], {TASKS}}}"]).notes
    assert "eval.rows.0.decode=twilight has no effect on passkey, which write no texts" in " ".join(notes)
    source = "source: {path: python-stdlib}"
    error = f"tasks: [{{task: attention_error, lengths: [128], rows: 32, {source}}}]"
    notes = load_recipe(tiny, [f"eval={{rows: [{{decode: twilight}}], {error}}}"]).notes
    assert "has no effect on attention_error, which write no texts; attention_error is of one pass" in " ".join(notes)
