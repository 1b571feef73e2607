"""Runs that learn from pairs of answers: any ranks and ZeRO stage, adapters, resumed, and what is refused."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from sparsetrain.cli import main

WORDS = ["the", "pass", "key", "is", "green", "sky", "blue", "sun", "info", "text", "quiz", "again"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Pairs whose answers have words of their own, and the settings to learn from them."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(40):
            sizes = (rng.choice([3, 10, 20]), rng.choice([2, 6, 12]), rng.choice([2, 8]))
            parts = (" ".join(rng.choices(words, k=k)) for words, k in zip((WORDS, WORDS[:5], WORDS[5:]), sizes))
            prompt, chosen, rejected = parts
            file.write(json.dumps({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}) + "\n")
        # Left out: a pair that does not fit a row, and one whose answers are equal.
        for answer in (" again" * 2000, " no"):
            file.write(json.dumps({"prompt": prompt, "chosen": answer, "rejected": " no"}) + "\n")
    return [f"data={{sources: [{{path: '{path}'}}], long_documents: drop}}", "preference.loss=dpo", "train.steps=4"]


@pytest.fixture(scope="module")
def measured(settings):
    """Settings that measure the same pairs before and after."""
    source = settings[0].partition("sources: [")[2].partition("]")[0]
    task = f"{{task: preference, source: {source}, pairs: 30, length: 256}}"
    return [f"eval={{at_start: true, at_end: true, tasks: [{task}]}}"]


@pytest.fixture(scope="module")
def trained(settings, measured, tiny, tmp_path_factory, run_folder):
    """All weights trained on one rank, with checkpoints."""
    run = run_folder(tmp_path_factory.mktemp("preference") / "run")
    assert main(["run", str(tiny), *settings, *measured, "checkpoint.every=2", "--output", str(run.path)]) == 0
    return run


def test_a_run_learns_which_answers_are_preferred(trained):
    first, *_, last = trained.steps
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # as likely as under the reference
    assert abs(first["rewards/margins"]) < 1e-4
    assert last["loss"] < 0.3
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert "perplexity" not in last
    assert len(json.loads((trained.path / "reference.json").read_text())["pairs"]) == 40


def test_the_log_of_a_run_says_which_pairs_are_left_out(trained):
    log = (trained.path / "run.log").read_text()
    assert "1 of 41 pairs are longer than sequence.length=" in log
    assert "pairs with equal answers left out: 1" in log


def test_held_out_pairs_are_ranked_before_and_after(trained):
    results = json.loads((trained.path / "evaluation.json").read_text())
    dense, before, after = (result["tasks"]["preference"] for result in results.values())
    assert dense["first"] is None
    assert before["first"] == after["first"] == dense["pairs"]
    logged = {name: value for line in trained.lines for name, value in line.items() if name.startswith("eval/")}
    assert logged["eval/preference"] == sum(chosen > rejected for chosen, rejected in after["pairs"]) / 30
    assert logged["eval/preference/reward_accuracy"] == 1.0
    gained = [(c - r) - (c0 - r0) for (c, r), (c0, r0) in zip(after["pairs"], dense["pairs"])]
    assert logged["eval/preference/reward_margin"] == pytest.approx(sum(gained) / 30)
    assert "preferred first" in (trained.path / "report.md").read_text()


def test_ranks_and_zero_stages_change_only_rounding(trained, settings, start, tmp_path, run_folder):
    other = run_folder(tmp_path / "two")
    start(other.path, *settings, "deepspeed.stage=3", ranks=2).wait()
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"):
        assert other.values(name) == pytest.approx(trained.values(name), rel=1e-3, abs=1e-4), name


def test_a_resumed_run_measures_nothing_again_and_ends_bit_for_bit(
    trained, settings, measured, tiny, tmp_path, run_folder, capsys
):
    again = run_folder(tmp_path / "again")
    shutil.copytree(trained.path, again.path)
    shutil.rmtree(again.path / "checkpoints/step-000004")
    command = ["run", str(tiny), *settings, *measured, "checkpoint.every=2", "--output", str(again.path), "--resume"]
    assert main(command) == 0
    assert "reference: 0 pairs measured, 40 known from before" in capsys.readouterr().err
    assert all(torch.equal(again.weights[name], weight) for name, weight in trained.weights.items())


def test_the_model_without_adapters_is_the_reference_that_is_measured(settings, tiny, pretrained, tmp_path, run_folder):
    found = {}
    for reference in ("adapters_off", "precomputed"):
        run = run_folder(tmp_path / reference)
        model = f"model={{path: '{pretrained / 'untied'}', dtype: float32}}"
        lora = ["lora.rank=4", f"preference.reference={reference}", "deepspeed.stage=3"]
        assert main(["run", str(tiny), *settings, model, *lora, "--output", str(run.path)]) == 0
        assert (run.path / "reference.json").exists() == (reference == "precomputed")
        found[reference] = [run.values(name) for name in ("loss", "rewards/margins", "grad_norm")]
    for off, measured in zip(found["adapters_off"], found["precomputed"]):
        assert off == pytest.approx(measured, rel=1e-4, abs=1e-5)
    assert found["adapters_off"][0][-1] < 0.65


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["preference=null"], "give the recipe a preference section"),
        (["data.long_documents=split"], "would cut the answers"),
        (["preference.reference=adapters_off"], "adapters_off needs lora"),
        (["preference.loss=simpo", "preference.reference=precomputed"], "has no effect on loss: simpo"),
        (["preference.loss=robust"], "loss: robust without label_smoothing is loss: dpo"),
        (["preference.loss=orpo", "preference.nll_weight=0"], "give nll_weight above 0"),
        (["sequence.parallel=2"], "2 ranks that share a row are not supported"),
        (["data.sources.0.form=chat"], "gives one document a row"),
        (["data.sources.0.chosen_field=better"], "needs a column 'better'"),
        (["data.sources.0.prompt_field=question"], "needs a column 'question'"),
        (["data.sources=[{synthetic: passkey}]"], "makes no pairs of answers"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_honoured_is_refused(changed, says, settings, tiny, refused, tmp_path):
    assert says in refused("run", str(tiny), *settings, *changed, "--output", str(tmp_path / "run"))
