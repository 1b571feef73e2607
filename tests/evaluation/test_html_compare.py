"""``sparsetrain compare``: several runs in one page."""

from __future__ import annotations

import re

import pytest
from made_runs import ATTACK, Words, make_run, passkey, results, rows, ruler

from sparsetrain.cli import main
from sparsetrain.evaluation.result import EvalResult


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs, of which the last measured other things."""
    top = tmp_path_factory.mktemp("runs")
    other = {"sliding, after": EvalResult(tasks={"passkey": passkey(2, [512, 1024]), "ruler": ruler()})}
    return [
        make_run(top / "power"),
        make_run(top / "fast", "train.lr=1e-3", steps=40),
        make_run(top / "sliding", "attention.method=sliding", "eval.tasks.passkey.lengths=[512,1024]", measured=other),
    ]


@pytest.fixture(scope="module")
def page(runs):
    out = runs[0].parent / "compare.html"
    assert main(["compare", *map(str, runs), "--output", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_numbers_have_their_difference_to_the_first_run(page):
    found = rows(page)
    assert " | power | fast | difference | sliding | difference" in found
    assert "tokens trained on | 491,520 | 327,680 | -33.3% | 491,520 | +0.0%" in found
    assert "all | 0.8750 | 0.8750 | 0 | 0.2500 | -0.6250" in found
    assert "2048 | 0.8750 | 0.8750 | 0 | - | -" in found


def test_settings_that_differ_are_side_by_side(page):
    found = rows(page)
    assert "attention.method | power | power | sliding" in found
    assert "train.lr | 0.0007 | 0.001 | 0.0007" in found
    assert not any(row.startswith(("name |", "output |")) for row in found)


def test_curves_are_over_one_another(page):
    titles = re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)
    assert "Training loss of 3 runs by step" in titles
    assert "Throughput of 3 runs by step" in titles
    assert any(title.startswith("Passkey retrieval: found by length") for title in titles)


def test_runs_with_different_tasks_are_compared_with_a_sentence(page):
    text = Words(page).text
    assert "Not measured in the last evaluation of sliding." in text
    assert "Not measured in the last evaluation of power, fast." in text
    assert "eval.tasks.passkey.lengths differ" in text
    assert "power: power, after; fast: power, after; sliding: sliding, after." in text


def test_results_of_other_inputs_are_compared_with_a_sentence(tmp_path):
    def run(place, inputs, *overrides):
        measured = {"power, after": EvalResult(tasks={"passkey": passkey(7).model_copy(update={"inputs": inputs})})}
        return make_run(tmp_path / place, *overrides, measured=measured, name=place)

    runs = [run("first", "a"), run("same", "a"), run("reseeded", "b", "train.seed=7")]
    out = tmp_path / "compare.html"
    assert main(["compare", *map(str, runs), "--output", str(out)]) == 0
    text = Words(out.read_text(encoding="utf-8")).text
    assert (
        "Other inputs than those of first (prompts, texts or tokens): reseeded. Compare numbers of equal inputs only."
        in text
    )
    assert "The runs measured different things: train.seed differ (see the recipes)." in text
    assert main(["compare", *map(str, runs[:2]), "--output", str(out)]) == 0
    assert "Other inputs" not in out.read_text(encoding="utf-8")


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, said in (
        ([runs[0]], "1 run cannot be compared; give 2 to 12 run folders"),
        ([runs[0]] * 13, "13 runs cannot be compared"),
        ([runs[0], runs[0] / "."], "is given twice"),
        ([runs[0], tmp_path], "is not a run folder"),
        ([*runs, "--output", tmp_path], "is a folder; name a file"),
        ([*runs, "--output", tmp_path / "no/c.html"], "there is no such folder to write to"),
        ([*runs, "--output", runs[0] / "recipe.yaml"], "exists already and is no page of sparsetrain"),
    ):
        assert main(["compare", *map(str, given)]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("drafts")
def test_runs_without_records_and_with_hostile_names(tmp_path):
    first = make_run(tmp_path / "a", name=ATTACK)
    second = make_run(tmp_path / "b", measured={}, name="_hidden")
    third = make_run(tmp_path / "c")
    (third / "recipe.yaml").write_text("{")
    (second / "metrics.jsonl").unlink()
    out = tmp_path / "compare.html"
    assert main(["compare", *map(str, (first, second, third)), "--output", str(out)]) == 0
    page = Words(out.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert ATTACK in page.text
    assert "_hidden: There is no metrics.jsonl." in page.text


@pytest.mark.usefixtures("drafts")
def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / place, measured=results(), name="same") for place in ("x/run", "y/run", "y/seed2")]
    out = tmp_path / "compare.html"
    assert main(["compare", *map(str, runs), "--output", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert f"3 runs: {runs[0]}, {runs[1]}, seed2" in Words(page).text
    assert "Recipe | same | same | same" in rows(page)
    runs.append(make_run(tmp_path / "other", name="other"))
    assert main(["compare", *map(str, runs), "--output", str(out)]) == 0
    page = Words(out.read_text(encoding="utf-8")).text
    assert f"4 runs: same ({runs[0]}), same ({runs[1]}), same (seed2), other" in page
