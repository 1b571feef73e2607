"""The page of a run: what it says, of whatever the run folder holds."""

from __future__ import annotations

import json
import os
import re
from typing import ClassVar, Literal

import pytest
from made_runs import ATTACK, Words, add_selection, lines, make_run, passkey, results, rows, ruler

from sparsetrain.cli import main
from sparsetrain.evaluation import metrics as reading
from sparsetrain.evaluation.base import Drawing, TaskReport, TaskResult, TaskSection
from sparsetrain.evaluation.html.blocks import Page, Section
from sparsetrain.evaluation.html.page import plain, write_page
from sparsetrain.evaluation.html.record import read_run
from sparsetrain.evaluation.html.svg import picture
from sparsetrain.evaluation.metrics import read_metrics, thinned
from sparsetrain.evaluation.registry import TASKS
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.differences import differences, shipped_origin


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of a run with everything, written by the command."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "whole", "train.lr=1e-3", measured=results(ruler=ruler()))
    add_selection(folder)
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_numbers_of_a_run_are_at_the_top(whole):
    text = re.sub(r"\s+", " ", Words(whole).text)
    for said in (
        "Method power",
        "Model sparsetrain:tiny 2.8M parameters",
        "Trained at 2,048 tokens",
        "Steps 60 of 60",
        "Tokens 491,520",
        "Last loss 2.119",
        "Throughput 40,071 tokens/s",
        "Peak memory 1.5 GB",
        "Cache 10 MB at 3,072 tokens",
    ):
        assert said in text, said


def test_tables_hold_what_was_measured_and_what_differs_from_the_shipped_recipe(whole):
    found = rows(whole)
    assert "power, after | 19.00 | 20.00 | 22.40" in found
    assert "power, after | 88% | 88% | 88% | 88% | 80% to 92%" in found
    assert any(row.startswith("worst | 45.0 niah_multikey_3 | 10.0 niah_multikey_3") for row in found)
    assert any(row.startswith("mean | 68.3 | 48.3") for row in found)
    assert "train.lr | 0.0007 | 0.001" in found
    assert "power | 10 MB | 71.4% | 3.26 kB" in found
    assert "5 | 0.4000" in found


def test_pictures_are_of_every_part(whole):
    titles = re.findall(r'<svg [^>]*aria-label="([^"]*)"', whole)
    for part in (
        "Training loss: 4.938 at step 1, 2.119 at step 60",
        "Throughput by step",
        "Perplexity by context length. Perplexity by context length: see the tables",
        "Passkey retrieval: found by length",
        "Passkey retrieval of power, after: see the tables",
        "RULER of power, after",
        "Blocks that see each other: 13.2% of full attention",
        "Blocks that reach the last one",
        "Density: share of the causal pairs attended",
        "sparsek/kept_mass",
        "How long each token of a row is read",
    ):
        assert any(title.startswith(part) for title in titles), (part, titles)


def test_the_file_stands_alone(whole):
    page = Words(whole)
    assert page.fetched == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("style") == 1, "one of a picture would be one of the whole page"
    assert "url(http" not in whole
    names = re.findall(r' id="([^"]+)"', whole)
    assert len(names) == len(set(names))
    assert {*re.findall(r'href="#([^"]+)"', whole), *re.findall(r"url\(#([^)]+)\)", whole)} <= set(names)


def test_text_of_a_run_is_never_markup(tmp_path):
    folder = make_run(tmp_path / "run", measured={ATTACK: results()["power, after"]}, name=ATTACK)
    (folder / "environment.json").write_text('{"python": "<script>", "packages": {"<script>": "<b>"}}')
    page = Words(write_page(folder, history=[ATTACK]).read_text(encoding="utf-8"))
    assert not {"script", "b"} & set(page.tags)
    assert ATTACK in page.text, "as it was written"


def test_a_long_run_stays_small(tmp_path):
    folder = make_run(tmp_path / "run", measured={})
    with (folder / "metrics.jsonl").open("w") as file:
        for line in lines(30_000, layers=0):
            file.write(json.dumps(line) + "\n")
    assert write_page(folder).stat().st_size < 500_000


def test_thinning_keeps_the_ends_and_every_spike():
    points = [(step, 1.0) for step in range(10_000)]
    points[5001] = (5001, 9.0)
    points[7003] = (7003, -9.0)
    found = thinned(points, 800)
    assert len(found) < 850
    assert found == sorted(found)
    assert found[0] == points[0]
    assert found[-1] == points[-1]
    assert {(5001, 9.0), (7003, -9.0)} <= set(found)
    assert thinned(points[:800], 800) == points[:800]


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.jsonl", "evaluation.json", "environment.json", "selection.npz"]
)
@pytest.mark.usefixtures("drafts")
def test_a_damaged_file_is_a_sentence_of_the_page(tmp_path, name):
    folder = make_run(tmp_path / "run", steps=2)
    # Deeper than parsers go. That of YAML takes a time that grows with the square.
    deep = b"[" * (500 if name == "recipe.yaml" else 9999)
    for content in (b"\x80\xff{", b"[1, 2]\n{}\n", b'{"step": "x"}\n{"step": 1, "loss": {}}', deep):
        (folder / name).write_bytes(content)
        if (name, content[:2]) != ("environment.json", b'{"'):
            assert any(name in note for note in read_run(folder).notes), content
    page = Words(write_page(folder).read_text(encoding="utf-8"))
    assert "What is missing" in page.text
    assert page.fetched == []


def test_characters_that_no_page_can_have_are_replaced(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a\\u0001/mass/layer_1": 1, "b\\ud800/mass/layer_1": 1}\n')
    page = write_page(folder).read_text(encoding="utf-8")
    assert "cannot be drawn" not in page
    assert "a\ufffd" in page
    assert "b\ufffd" in page
    assert "\x01" not in page


@pytest.mark.parametrize("given", [{"cache/bytes": 8}, {"cache/bytes": 8, "cache/bytes_full": 9, "cache/tokens": 0}])
def test_a_cache_of_no_tokens_is_left_out(tmp_path, given):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **given}) + "\n")
    assert "Cache" not in Words(write_page(tmp_path).read_text(encoding="utf-8")).text


def test_a_run_that_has_recorded_nothing_yet_has_no_reach_to_draw(tmp_path):
    folder = make_run(tmp_path / "run", "attention.dense_layers=[-1]", steps=2)
    (folder / "metrics.jsonl").write_text("")
    text = Words(write_page(folder).read_text(encoding="utf-8")).text
    assert "No steps are recorded." in text
    assert "cannot be drawn" not in text


def test_what_is_wrong_with_a_recipe_is_said(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    (folder / "recipe.yaml").write_text("train: {steps: 5, wrong: 1}\n")
    assert any("recipe.yaml:1: model: is required" in note for note in read_run(folder).notes)


@pytest.mark.usefixtures("drafts")
def test_results_that_make_no_sense_are_a_sentence(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    odd = {"task": "passkey", "lengths": [], "depths": [], "trials": 0, "digits": 5, "correct": []}
    (folder / "evaluation.json").write_text(json.dumps({"after": {"tasks": {"passkey": odd}}}))
    (folder / "final").mkdir()
    (folder / "final/config.json").write_text('{"num_key_value_heads": 1e99, "num_attention_heads": "x"}')
    assert "The results cannot be shown (ZeroDivisionError" in Words(write_page(folder).read_text()).text


def test_headings_that_are_alike_have_addresses_of_their_own():
    page = Page("twice", "", [], [Section("Recipe"), Section("Recipe"), Section("問")])
    names = re.findall(r'<h2 id="([^"]+)"', page.html())
    assert len(set(names)) == 3


@pytest.mark.usefixtures("drafts")
def test_what_is_missing_is_said(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("recipe.yaml", "metrics.jsonl"):
        (folder / name).unlink()
    (folder / "evaluation.json").write_text("{}")
    text = Words(write_page(folder).read_text(encoding="utf-8")).text
    for said in ("There is no recipe.yaml.", "There is no metrics.jsonl.", "No evaluation is recorded."):
        assert said in text


@pytest.mark.usefixtures("drafts")
def test_steps_that_went_wrong_are_counted(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": null}\n{"step": 62, "loss": 1e999}\n{"step": 63, "lo')
    text = Words(write_page(folder).read_text(encoding="utf-8")).text
    assert "The loss of 2 steps was not a finite number." in text
    assert "1 line of metrics.jsonl cannot be read." in text


def test_a_byte_order_mark_before_the_metrics_costs_no_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    metrics = read_metrics(file)
    assert metrics.curves["loss"] == [(1, 3.0), (2, 2.0)]
    assert metrics.unreadable == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder (it has no recipe.yaml, metrics.jsonl or evaluation.json)" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.usefixtures("drafts")
def test_other_files_are_not_replaced(tmp_path, capsys):
    folder = make_run(tmp_path / "run", steps=2, measured={})
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert main(["report", str(folder), "--output", str(mine)]) == 2
    assert "is no page of sparsetrain; name another file" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert main(["report", str(folder), "--output", str(tmp_path / "no/such.html")]) == 2
    mine.unlink()
    for _ in range(2):  # an earlier page is
        assert main(["report", str(folder), "--output", str(mine)]) == 0


@pytest.mark.usefixtures("drafts")
def test_a_pipe_in_the_place_of_metrics_is_not_waited_for(tmp_path):
    folder = make_run(tmp_path / "run", measured={})
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert "metrics.jsonl is not a file" in write_page(folder).read_text(encoding="utf-8")


class StepsResult(TaskResult):
    """A task that no file of ours names."""

    task: Literal["steps"] = "steps"
    value: float
    broken: ClassVar[bool] = False

    def metrics(self):
        return {"": self.value}

    def score(self):
        return self.value

    @classmethod
    def report(cls, results):
        rows = [["", "steps"], *([label, f"{result.value}"] for label, result in results.items())]
        return TaskReport("Steps climbed", "Stairs", "How many.", rows)

    @classmethod
    def drawing(cls, name, results, trained_length):
        def draw(axes):
            if cls.broken:
                raise RuntimeError("no stairs")
            axes.plot([1, 2], [1, 2])

        return Drawing(draw, 5, 4)


class StepsSection(TaskSection):
    result = StepsResult
    task: Literal["steps"] = "steps"

    def lengths_by_field(self):
        return {}

    def try_inputs(self, tokenizer):
        pass

    def build(self, tokenizer, seed):
        raise NotImplementedError


@pytest.mark.parametrize("broken", [False, True])
def test_a_new_task_appears_by_itself(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(StepsResult, "broken", broken)
    monkeypatch.setitem(TASKS, "steps", StepsSection)
    folder = make_run(tmp_path / "run", measured={"after": EvalResult(tasks={"steps": StepsResult(value=12)})})
    page = write_page(folder).read_text(encoding="utf-8")
    assert "after | 12.0" in rows(page)
    assert ("Stairs: see the tables" in page) != broken
    assert ("A picture cannot be drawn (RuntimeError: no stairs)." in page) == broken


def test_colours_are_those_of_the_page():
    from sparsetrain.evaluation.panels import BLUE, INK

    def draw(axes):
        axes.plot([1, 2], [1, 2], color=BLUE)
        axes.set_title("of $a run", color=INK)

    svg = picture(draw, "a line").svg
    assert BLUE.lower() not in svg
    assert "var(--blue)" in svg
    assert "var(--ink)" in svg
    assert "of $a run" in svg
    assert "font-family" not in svg


def test_the_shipped_recipe_is_found_by_name_or_by_likeness():
    recipe = load_recipe("quickstart", ["train.lr=1e-3", "eval.tasks.passkey.trials=9"]).recipe
    renamed = recipe.model_copy(update={"name": "mine", "output": "elsewhere"})
    for each in (recipe, renamed):
        name, shipped = shipped_origin(each)
        assert name == "quickstart"
        assert differences([shipped, each]) == {"train.lr": [7e-4, 1e-3], "eval.tasks.passkey.trials": [8, 9]}
    assert differences([recipe, renamed]) == {}


def test_a_task_that_one_recipe_lacks_is_one_setting():
    less = ["eval.tasks.passkey=null", "data.sources=[{path: python-stdlib}]"]
    found = differences([load_recipe("quickstart", each).recipe for each in ([], less)])
    assert found == {
        "data.sources.1": [{"synthetic": "passkey", "weight": 2}, None],
        "eval.tasks.passkey": [{"task": "passkey", "lengths": [512, 1024, 2048], "trials": 8}, None],
    }
    assert plain(found["eval.tasks.passkey"][0]) == "task: passkey, lengths: [512, 1024, 2048], trials: 8"


def test_metrics_are_read_once_and_in_bounded_memory(tmp_path):
    file = tmp_path / "metrics.jsonl"
    more = ["", "[]", '{"step": 51, "loss": ' + "9" * 400 + "}"]
    file.write_text("\n".join([*map(json.dumps, lines(50)), *more]))
    found = read_metrics(file)
    assert len(found.curves["loss"]) == 50
    assert found.unreadable == 1
    assert found.nonfinite == 1
    assert found.layers["sparsek/kept_mass"][5] == pytest.approx((0.4, 0.4))
    assert set(found.curves) == set(reading.CURVES)
    assert passkey(7).accuracy_by_length()[512].value == 35 / 40
