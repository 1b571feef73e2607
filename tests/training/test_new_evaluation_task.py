"""A task that is registered works everywhere: nothing else names the tasks there are."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
from pydantic import PositiveInt

from sparsetrain.cli import main
from sparsetrain.evaluation.base import Drawing, Task, TaskReport, TaskResult, TaskSection
from sparsetrain.evaluation.registry import TASKS
from sparsetrain.recipe.describe import json_schema


class EchoResult(TaskResult):
    """How often a token predicts itself."""

    wide = True

    task: Literal["echo"] = "echo"
    tokens: int
    found: int

    def metrics(self):
        return {"": self.found / self.tokens, "/found": float(self.found)}

    def score(self):
        return float(self.tokens)

    @classmethod
    def report(cls, results):
        rows = [["", "echoes"], *([label, str(result.tokens)] for label, result in results.items())]
        return TaskReport("Echoes on the console", "Echoes", "Tokens that were tried.", rows)

    @classmethod
    def drawing(cls, name, results, trained_length):
        return Drawing(lambda figure: figure.subplots().plot([1, 2]), 2, 2)


class EchoSection(TaskSection):
    """Echoes."""

    result = EchoResult

    task: Literal["echo"] = "echo"
    """Echoes."""
    tokens: PositiveInt
    """How many."""

    def lengths_by_field(self):
        return {"tokens": [self.tokens]}

    def try_inputs(self, tokenizer):
        tokenizer("one")

    def build(self, tokenizer, seed):
        return Echo(self.tokens)


class Echo(Task):
    def __init__(self, tokens):
        self.tokens = torch.arange(tokens)[None]

    def num_forwards(self, ranks):
        return 1

    def measure(self, model, world, on_forward):
        found = model(self.tokens, use_cache=False).logits.argmax(-1) == self.tokens
        on_forward()
        return EchoResult(tokens=self.tokens.shape[1], found=int(found.sum()))


@pytest.fixture
def _registered(monkeypatch):
    monkeypatch.setitem(TASKS, "echo", EchoSection)


@pytest.mark.usefixtures("_registered")
def test_a_registered_task_runs_from_a_recipe_to_every_result(tmp_path, tiny, run_folder, rendered, capsys):
    run = run_folder(tmp_path / "run")
    tasks = "tasks: [{task: echo, tokens: 24}, {task: echo, name: short, tokens: 8}]"
    arguments = [f"eval={{every: 3, at_start: false, at_end: true, {tasks}}}", "eval.tasks.short.tokens=16"]
    assert main(["run", str(tiny), *arguments, "checkpoint.keep_best=short", "--output", str(run.path)]) == 0
    assert "Echoes on the console: short" in capsys.readouterr().out

    page = (run.path / "report.html").read_text()
    assert ">Echoes: short</h2>" in page
    assert page.count("Echoes: short of ") == 2, "a picture of each result"

    results = json.loads((run.path / "evaluation.json").read_text())
    assert list(results) == ["power, step 3", "power, after"]
    measured = results["power, after"]["tasks"]
    assert {name: result["tokens"] for name, result in measured.items()} == {"echo": 24, "short": 16}
    assert all(result["task"] == "echo" for result in measured.values())
    shares = [line["eval/short"] for line in run.lines if "eval/short" in line]
    assert shares[-1] == measured["short"]["found"] / 16
    assert [line["step"] for line in run.lines if "eval/echo/found" in line] == [3, 6]
    report = (run.path / "report.md").read_text()
    assert "## Echoes\n\nTokens that were tried.\n\n|  | echoes |\n| --- | ---: |\n| power, step 3 | 24 |" in report
    assert "## Echoes: short\n" in report
    best = json.loads((run.path / "checkpoints/best.json").read_text())
    assert best == {"checkpoint": "step-000003", "metric": "short", "value": 16.0}
    for name in ("loss", "attention", "short", "echo", "report"):
        assert (run.path / f"{name}.png").stat().st_size > 10_000

    command = ["eval", str(run.path / "final"), str(tiny), "eval.tasks.echo.tokens=4"]
    assert main([*command, "--output", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["rows"]["trained (power)"]["tasks"]["echo"]["tokens"] == 4
    assert "EchoSection" in json_schema()["$defs"]


@pytest.mark.usefixtures("_registered")
def test_its_mistakes_are_told_as_those_of_ours(tmp_path, tiny, refused):
    output = ["--output", str(tmp_path / "run")]
    assert "eval.tasks.echo.tokens: is required" in refused("run", str(tiny), "eval.tasks=[{task: echo}]", *output)
    said = refused("run", str(tiny), "eval.tasks=[{task: echo, tokens: 3, token: 4}]", *output)
    assert "eval.tasks.echo.token: unknown key; did you mean eval.tasks.echo.tokens?" in said
    said = refused("run", str(tiny), "eval.tasks=[{task: ecko, tokens: 3}]", *output)
    assert "task: there is no 'ecko'; did you mean echo?" in said


def test_a_task_that_lacks_a_part_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match="Half defines a task but lacks build, lengths_by_field, try_inputs, result"):

        class Half(TaskSection):
            task: Literal["half"] = "half"

    with pytest.raises(TypeError, match="Nothing is the result of a task but lacks metrics, report, score"):

        class Nothing(TaskResult):
            task: Literal["half"] = "half"
