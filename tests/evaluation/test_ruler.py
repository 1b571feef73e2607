"""RULER's scores by hand, and an evaluation from a recipe to its tables, on one rank and on two."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.errors import RecipeError
from sparsetrain.evaluation.generative.tally import Tally
from sparsetrain.evaluation.generative.writing import Text, TextWriter
from sparsetrain.evaluation.report import print_results, write_report
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.ruler.prompts import Prompts
from sparsetrain.evaluation.ruler.result import RulerResult
from sparsetrain.evaluation.ruler.specs import ANSWERS, answers_found
from sparsetrain.evaluation.tasks.ruler import RulerSection
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.recipe import load_recipe
from sparsetrain.world import World


@pytest.mark.parametrize(
    ("task", "text", "references", "found"),
    [
        ("niah_single_1", " 1234567.", ["1234567"], 1),
        ("niah_single_1", " 123456", ["1234567"], 0),
        ("niah_multivalue", "7, 8 and\x01 10", ["7", "8", "9", "10"], 3),
        ("cwe", "1. APPLE\x002. Pear", ["apple", "peAR", "fig"], 2),
        ("vt", "AB\x1fCD", ["AB\x1fCD", "AB\nCD", "ABCD"], 1),
        ("qa_1", "It was Ann, I think", ["Ann Smith", "ann"], 1),
        ("qa_1", "It was ANN SMITH", ["Ann Smith", "ann"], 1),
        ("qa_2", "I do not know", ["yes"], 0),
        ("qa_2", "nothing", ["no"], 1),
        ("qa_1", "", ["Ann"], 0),
    ],
)
def test_an_answer_is_found_where_the_text_contains_it(task, text, references, found):
    assert answers_found(task, text, references) == found


def result(found, **given):
    lengths, samples = given.pop("lengths", [4096, 8192]), given.pop("samples", 20)
    return RulerResult(
        lengths=lengths,
        tallies={
            task: [Tally(asked=samples, right=each, written=5 * samples, cut=samples // 4) for each in counts]
            for task, counts in found.items()
        },
        left_out=given.pop("left_out", {}),
        prompt="plain",
        mirror=False,
        haystack="generated",
        words="generated",
    )


def test_scores_means_and_the_worst():
    measured = result({"niah_single_1": [20, 19], "vt": [100, 30], "qa_1": [17, 13]}, left_out={"qa_2": "no file"})
    assert measured.shares()["vt"] == [100, 30]
    assert measured.means() == pytest.approx([95, (95 + 30 + 65) / 3])
    assert measured.mean() == pytest.approx((95 + 190 / 3) / 2)
    assert measured.effective_length() == 4096
    assert measured.worst() == ("vt", 8192, 30)
    assert measured.worst_at(0) == ("qa_1", 85)
    assert measured.interval("vt", 0) is None
    assert measured.interval("niah_single_1", 0) == pytest.approx((83.9, 100), abs=0.1)
    metrics = measured.metrics()
    assert metrics[""] == measured.score() == measured.mean()
    assert (metrics["/8192/worst"], metrics["/8192/vt"], metrics["/worst"]) == (30, 30, 30)
    assert (metrics["/written"], metrics["/cut"]) == (5, 0.25)
    assert "/effective_length" not in metrics
    about = RulerResult.report({"after": measured}).about
    assert "those of 3 of the 13 tasks. Left out: qa_2 (no file)." in about
    assert "4,096 of 3 tasks" in RulerResult.report({"after": measured}).rows[1]
    whole = result({task: [18 * ANSWERS[task], 15 * ANSWERS[task]] for task in ANSWERS})
    assert whole.metrics()["/effective_length"] == 4096
    assert "4,096" in RulerResult.report({"after": whole}).rows[1]


def test_weighted_means_are_those_of_the_papers_table():
    """Jamba-1.5-large: 96.7, 96.6, 96.4, 96.0, 95.4 and 95.1 from 4K to 128K; wAvg 95.7 (inc) and 96.3 (dec)."""
    lengths = [4096 * 2**power for power in range(6)]
    measured = result({"qa_1": [967, 966, 964, 960, 954, 951]}, lengths=lengths, samples=1000)
    assert round(measured.weighted(to_long=True), 1) == 95.7
    assert round(measured.weighted(to_long=False), 1) == 96.3
    assert measured.effective_length() == 131072
    assert result({"qa_1": [856]}, lengths=[4096], samples=1000).effective_length() is None


def test_tables_and_pictures_show_tasks_beside_the_mean(tmp_path, capsys):
    measured = result({"niah_single_1": [20, 19], "vt": [100, 30]})
    results = {name: EvalResult(tasks={"ruler": measured}) for name in ("before", "after")}
    print_results(results)
    printed = capsys.readouterr().out
    assert "RULER by length (mean of 2 tasks, prompts of each: 20)" in printed
    assert "30.0 vt at 8K" in printed
    report = write_report(results, tmp_path, title="Evaluation").read_text()
    assert "| niah_single_1 | 100.0 [84, 100] | 95.0 [76, 99] | 5, 25% cut at 128 |" in report
    assert "| worst | 100.0 niah_single_1 | 30.0 vt |  |" in report
    assert EvalResult.model_validate_json(results["after"].model_dump_json()) == results["after"]
    from matplotlib.figure import Figure

    drawing = RulerResult.drawing("ruler", {"after": measured}, None)
    figure = Figure(figsize=(drawing.width, drawing.height))
    drawing.draw(figure)
    figure.savefig(tmp_path / "ruler.png")
    assert (tmp_path / "ruler.png").stat().st_size > 10_000


@pytest.fixture
def answering():
    """A random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.3,
        eos_token_id=256,
    )
    return sparsetrain.sparsify(LlamaForCausalLM(config).eval(), {"method": "power", "block": 32, "window": 2})


def test_texts_are_those_of_each_prompt_alone_whatever_the_batch_and_the_ranks(answering, byte_tokenizer):
    prompts = [torch.randint(256, (length,)).int().numpy() for length in (70, 3, 41)]
    texts = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.from_numpy(prompt).long()[None]
            for _ in range(12):
                ids = torch.cat([ids, answering(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            texts.append(ids[0, len(prompt) :].tolist())
    end = texts[0][5]
    expected = [Text(text[: text.index(end)], False) if end in text else Text(text, True) for text in texts]
    assert {text.cut for text in expected} == {True, False}
    own = answering.generation_config
    own.eos_token_id, own.repetition_penalty, own.do_sample = [end], 5.0, True
    for in_step in (False, True):
        writer = TextWriter(answering, byte_tokenizer, in_step=in_step)
        # The second time in the cache of the first.
        assert writer.write(prompts, 12, 100) == writer.write(prompts, 12, 100) == expected
    assert answering.generation_config is own
    passes = []
    answering.register_forward_hook(lambda *_: passes.append(1))
    for in_step, expected_passes in ((False, 6), (True, 12)):
        passes.clear()
        TextWriter(answering, byte_tokenizer, in_step=in_step).write(prompts[:1], 12)
        assert len(passes) == expected_passes


@pytest.mark.parametrize("method", ["full", "power", "sparsek", "decode"])
def test_prompts_that_begin_alike_are_answered_as_each_alone(answering, byte_tokenizer, method):
    sections = {
        "sparsek": {"method": "sparsek", "topk": 8, "window": 8, "sinks": 2, "score_buffer": 4096},
        "power": {"method": "power", "block": 16, "window": 2},
    }
    sparsetrain.sparsify(answering, sections.get(method, {"method": "full"}))
    if method == "decode":
        sparsetrain.set_decode(answering, {"select": "quest", "candidates": 32, "dense_layers": []})
    text = torch.randint(256, (90,)).int()
    prompts = [torch.cat([text, torch.randint(256, (length,)).int()]).numpy() for length in (9, 30, 9)]
    passes = []
    answering.register_forward_hook(lambda *_: passes.append(1))
    for in_step in (False, True):
        writer = TextWriter(answering, byte_tokenizer, in_step=in_step)
        alone = [found for prompt in prompts for found in writer.write([prompt], 12)]
        passes.clear()
        assert writer.write_each(prompts, 12) == alone
    assert len(passes) == 1 + 3 * 12
    assert len({tuple(each.tokens) for each in alone}) == 3


def test_several_questions_of_a_text_are_counted_each(answering, byte_tokenizer):
    section = RulerSection(lengths=[1500], tasks=["niah_multikey_1", "niah_single_1"], samples=2, questions=3)
    task = section.build(byte_tokenizer, 0)
    assert {group: len(batches) for group, batches in task.batches().items()} == {
        "3 times 128 tokens": 2,
        "128 tokens": 1,
    }
    measured = task.measure(answering, World(0, 1, torch.device("cpu")), lambda: None)
    assert {task: tallies[0].asked for task, tallies in measured.tallies.items()} == {
        "niah_single_1": 2,
        "niah_multikey_1": 6,
    }
    assert "prompts of each: 2 to 6" in RulerResult.report({"after": measured}).title


def recipe(folder: Path, **settings) -> Path:
    tasks = [{"task": "ruler", "name": "long", **settings}]
    file = folder / "recipe.yaml"
    file.write_text(f"base: quickstart\neval: {{tasks: {json.dumps(tasks)}}}\n")
    return file


def test_an_evaluation_runs_from_a_recipe_to_its_numbers(tmp_path, capsys, answering):
    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    answering.resize_token_embeddings(len(tokenizer))
    sparsetrain.save(answering, tmp_path / "model", tokenizer)
    file = recipe(tmp_path, lengths=[1300, 1100], tasks=["fwe", "vt"], samples=2)
    output = tmp_path / "result.json"
    assert main(["eval", str(tmp_path / "model"), str(file), "--output", str(output)]) == 0
    assert "RULER by length (mean of 2 tasks, prompts of each: 2)" in capsys.readouterr().out
    (row,) = json.loads(output.read_text())["rows"].values()
    measured = row["tasks"]["long"]
    assert measured["lengths"] == [1100, 1300]
    assert [*measured["tallies"]] == ["vt", "fwe"]
    assert all(each["asked"] == 2 and 0 < each["written"] <= 2 * 30 for each in measured["tallies"]["vt"])
    assert (measured["prompt"], measured["haystack"], measured["mirror"]) == ("plain", "generated", False)


def test_questions_and_lengths_that_cannot_be_are_refused(tmp_path):
    for settings, said in (
        ({"lengths": [4096, 8192, 4096]}, "lengths: has 4096 2 times"),
        ({"questions": 2, "mirror": True}, "questions: NVIDIA's scripts ask one question of a text"),
        ({"questions": 2, "tasks": ["vt"]}, "questions: has no effect here: only niah_multikey_1, "),
    ):
        with pytest.raises(RecipeError, match=rf"eval\.tasks\.long\.{said}"):
            load_recipe(recipe(tmp_path, **settings))


def test_tasks_without_their_files_are_left_out_or_refused(tmp_path):
    every = RulerSection()
    assert len(every.measured) == 11
    assert every.left_out == {"qa_1": "no squad file is given", "qa_2": "no hotpot file is given"}
    assert RulerSection(squad="x").left_out == {"qa_2": "no hotpot file is given"}
    with pytest.raises(RecipeError, match=r"eval\.tasks\.long\.tasks: .*qa_1 needs eval\.tasks\.long\.squad"):
        load_recipe(recipe(tmp_path, tasks=["qa_1", "vt"]))
    for field in ("squad", "hotpot", "haystack", "words"):
        with pytest.raises(RecipeError, match=rf"eval\.tasks\.long\.{field}: has no effect here: none of .* needs it"):
            load_recipe(recipe(tmp_path, tasks=["vt", "niah_multikey_3"], **{field: "x"}))


def test_prompts_are_made_once_until_something_changes(byte_tokenizer, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Prompts, "all", lambda self: made.append(self) or [])
    essay = tmp_path / "essay.txt"
    essay.write_text("One. Two.")
    section = RulerSection(tasks=["niah_single_2"], haystack=str(essay), name="kept")
    for _ in range(3):
        section.build(byte_tokenizer, 1)
    assert len(made) == 1
    section.build(byte_tokenizer, 2)
    os.utime(essay, (1, 1))
    section.build(byte_tokenizer, 2)
    section.model_copy(update={"samples": 3}).build(byte_tokenizer, 2)
    assert len(made) == 4
