"""``sparsetrain compare-decode``: answers are counted as ``sparsetrain eval`` counts them, budgets are kept, and what
cannot be compared is refused."""

from __future__ import annotations

import csv
import json
import re
from copy import deepcopy
from importlib.metadata import version

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.data import collate
from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import ModelError
from sparsetrain.evaluation.decode_answers import FREE, Answerer, Question
from sparsetrain.evaluation.decode_settings import Asked, chosen_settings, settings
from sparsetrain.evaluation.tasks.multi_turn import MultiTurnSection
from sparsetrain.evaluation.tasks.recall import Recall, RecallSection
from sparsetrain.generation.measured import MeasuredMemory, WindowMemory
from sparsetrain.generation.settings import PUBLISHED, parse_decode
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer
from sparsetrain.world import World

TASK = {"synthetic": "recall", "keys": 3, "lengths": [48, 64]}
EVERYTHING = parse_decode({"select": "quest", "candidates": 16, "recent": 100, "dense_layers": []})
FEW = parse_decode({"select": "quest", "candidates": 16, "sinks": 0, "recent": 2, "dense_layers": []})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")


@pytest.fixture(scope="module")
def recall(tokenizer):
    return Recall(RecallSection(source=TASK, documents=6), tokenizer, seed=0)


@pytest.fixture(scope="module")
def model(recall):
    """Random layers, and an output that knows the answers of half the documents by heart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
    )
    made = sparsetrain.sparsify(LlamaForCausalLM(config).eval(), {"method": "full"})
    batch = collate(recall.answered()[::2])
    places = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]
    with torch.no_grad():
        inputs = {"position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens, "use_cache": False}
        hidden = made.model(batch.input_ids, **inputs).last_hidden_state[0, places]
        wanted = torch.nn.functional.one_hot(batch.labels[0, places + 1], 2048).float()
        made.lm_head.weight.copy_(10 * torch.linalg.lstsq(hidden, wanted).solution.T)
    return made


@pytest.fixture
def answerer(model, tokenizer, recall):
    return Answerer(model, tokenizer, [Question.of(row, 8) for row in recall.answered()], extra=4, batch=4)


def test_dense_answers_are_those_of_an_evaluation(model, recall, answerer):
    with torch.no_grad():
        expected = recall.measure(model, World(0, 1, torch.device("cpu")), lambda: None)
    assert 3 < expected.correct < expected.answers
    found = answerer.answer(EVERYTHING, WindowMemory)
    assert sum(found.found) / 6 == pytest.approx(expected.accuracy())
    assert (found.mean("error"), found.mean("mass")) == (0, pytest.approx(1, abs=1e-5))
    assert found.mean("bytes") == found.mean("dense_bytes")
    fewer = answerer.answer(FEW, WindowMemory)
    assert sum(fewer.found) < sum(found.found)
    assert "decode" not in model.config.sparsetrain


def test_the_models_own_generation_config_changes_no_answer(model, tokenizer, answerer, monkeypatch):
    """Recall repeats what was read, which penalties forbid; and an answer, or a question, may hold any token."""
    expected = answerer.answer(EVERYTHING, WindowMemory)
    question = answerer.questions[0]
    own = model.generation_config
    ends = [question.steps[3], question.answers[8][0]]
    fields = {"no_repeat_ngram_size": 1, "repetition_penalty": 9.0, "prefill_chunk_size": 16, "eos_token_id": ends}
    for name, value in fields.items():
        monkeypatch.setattr(own, name, value)
    again = Answerer(model, tokenizer, answerer.questions, extra=4, batch=4)
    found = again.answer(EVERYTHING, WindowMemory)
    assert found.found == expected.found
    assert found.mean("length") == expected.mean("length")
    assert model.generation_config is own


def test_batches_change_nothing(model, tokenizer, answerer):
    alone = Answerer(model, tokenizer, answerer.questions, extra=4, batch=1)
    decode = parse_decode({"prune": {"p": 0.6, "min_keys": 1}, "sinks": 1, "recent": 2, "dense_layers": [0]})
    one, many = (each.answer(decode, MeasuredMemory) for each in (alone, answerer))
    assert one.found == many.found
    assert [*one.layers] == [*many.layers] == [1]
    for field in ("error", "mass", "keys", "bytes", "length"):
        assert one.mean(field) == pytest.approx(many.mean(field), rel=1e-4)


def test_a_question_is_cut_before_its_first_answer(recall):
    row = recall.answered()[0]
    question = Question.of(row, 8)
    place = int((row.labels != IGNORE).argmax())
    assert question.prompt == row.input_ids[: place - 8].tolist()
    assert [*question.answers] == [8, 10, 12]
    assert [at for at, token in enumerate(question.steps) if token == FREE] == [8, 10, 12]
    assert question.found(row.input_ids[place - 8 :].tolist()) == 1
    with pytest.raises(ModelError, match=r"--question 48: the first answer of .* is behind 43 tokens"):
        Question.of(row, 48)


def test_a_longer_neighbour_adds_no_steps(model, tokenizer, answerer):
    """Of what is written behind the end of a document nothing is measured."""
    longer, shorter = answerer.questions[:2]
    del shorter.steps[11:], shorter.answers[12]
    alone = [Answerer(model, tokenizer, [each], extra=4, batch=1) for each in (longer, shorter)]
    both = Answerer(model, tokenizer, [longer, shorter], extra=4, batch=2).answer(FEW, WindowMemory)
    steps = [int(each.answer(FEW, WindowMemory).layers[0][-1]) for each in alone]
    assert steps == [12, 10]
    assert both.layers[0][-1] == 22


def test_a_text_ends_with_its_line_and_its_length_counts_from_the_answer(model, tokenizer, recall):
    """One answer a document; a model that writes a line break after three tokens."""
    row = recall.answered()[0]
    labels = row.labels.copy()
    labels[:-1] = IGNORE
    question = Question.of(type(row)(row.input_ids, labels, row.lengths, row.origin), 8)
    answerer = Answerer(model, tokenizer, [question], extra=6, batch=1)
    broken = tokenizer("\n")["input_ids"][-1]
    hook = model.lm_head.register_forward_hook(Breaks(broken, after=3))
    try:
        ended = answerer.answer(EVERYTHING, WindowMemory)
    finally:
        hook.remove()
    assert (ended.lengths, ended.ended, ended.ended_length(right=True)) == ([3], [True], 3)
    cut = answerer.answer(EVERYTHING, WindowMemory)
    assert (cut.lengths, cut.ended, cut.found) == ([7], [False], [1])
    assert cut.ended_length(right=True) is cut.ended_length(right=False) is None


def test_the_last_turn_of_a_conversation_is_answered(model, tokenizer):
    task = MultiTurnSection(lengths=[512], samples=2, turns=3, keys=4).build(tokenizer, 0)
    first, other = (Question.of(row, 32) for row in task.answered())
    (start,) = first.answers
    assert start == 32
    assert tokenizer.decode(first.prompt + first.steps[:start]).endswith(" is")
    assert tokenizer.decode(first.answers[start]) == f" {task.talks[0].turns[-1].answer}"
    read = tokenizer.decode(first.prompt)
    assert all(f" is {turn.answer}\n" in read for turn in task.talks[0].turns[:-1])
    measured = Answerer(model, tokenizer, [first, other], extra=2, batch=2).answer(FEW, WindowMemory)
    assert measured.found == [0, 0]
    assert (measured.ended, measured.lengths) == ([False, False], [len(first.answers[start]) + 2] * 2)


class Breaks:
    """Makes the output a line break, some tokens after the question of 8."""

    def __init__(self, token, after):
        self.token, self.left = token, 8 + after

    def __call__(self, layer, given, out):
        self.left -= 1
        if self.left == 0:
            out[..., self.token] = out.max() + 1


def test_published_numbers_become_shares_of_a_short_text():
    known = {setting.name: setting for setting in settings(512, [0], 32)}
    assert [*known] == ["window", *PUBLISHED, "oracle-top-k", "oracle-top-p"]
    assert (known["twilight"].decode().candidates, known["quest"].decode().candidates) == (128, 64)
    double = known["double-sparsity"].decode()
    assert (double.candidates, double.channels) == (32, 4)
    assert known["twilight"].decode().prune.p == PUBLISHED["twilight"]["prune"]["p"]
    assert (known["recycled"].decode().refresh.keep, known["refreshkv"].decode().refresh.keep) == (64, 64)
    assert {(each.decode().sinks, each.decode().recent) for each in known.values()} == {(4, 16), (0, 1)}
    assert all(each.decode().dense_layers == [0] for each in known.values())
    long = {setting.name: setting.decode() for setting in settings(32768, [], 128)}
    assert (long["quest"].candidates, long["quest"].recent, long["twilight"].prune.min_keys) == (4096, 64, 64)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    sparsetrain.save(model, tmp_path / "model", tokenizer)
    task = {"task": "recall", "source": TASK, "documents": 4}
    (tmp_path / "recipe.yaml").write_text(f"base: quickstart\neval: {{tasks: [{json.dumps(task)}]}}\n")
    return tmp_path


def call(capsys, *arguments):
    code = main(["compare-decode", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.replace("│", " ").split())


def test_from_a_model_to_files(folder, capsys):
    chosen = ("window", "twilight-full", "oracle-top-p")
    options = [part for name in chosen for part in ("--setting", name)]
    given = (folder / "model", folder / "recipe.yaml", "--question", "2", *options, "--budget", "0.3")
    code, out, err = call(capsys, *given, "--output", folder / "found")
    assert code == 0, err
    assert "At most 30% of the bytes" in out
    assert "does not fit" in out
    assert err.index("measured: dense") < err.index("measured: window")
    rows = json.loads((folder / "found/decode.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "twilight-full", *chosen]
    assert rows[0]["bytes_share"] == 1
    for row in rows[2:]:
        assert row["fits"] == (row["bytes_share"] <= row["budget"]) == (row["accuracy"] is not None)
    assert [row["fits"] for row in rows[2:]] == [True, False, True]
    errors = {row["name"]: row["error"] for row in rows if row["budget"]}
    assert errors["oracle-top-p"] < errors["window"]
    table = list(csv.DictReader((folder / "found/decode.csv").open()))
    assert [row["name"] for row in table] == [row["name"] for row in rows]
    assert float(table[1]["error of layer 1"]) == pytest.approx(rows[1]["error_by_layer"]["1"])
    assert (folder / "found/decode.md").read_text().count("| twilight-full |") == 2
    assert (folder / "found/decode.png").stat().st_size > 1000


def test_settings_with_fields_and_another_model_are_rows(model, tokenizer, folder, capsys):
    attention = {"method": "sliding", "block": 16, "window": 2, "sinks": 0}
    sparsetrain.save(sparsetrain.sparsify(deepcopy(model), attention), folder / "narrow/final", tokenizer)
    chosen = ("oracle-top-k,refresh.keep=4", "oracle-top-k,refresh.keep=16", "twilight-full,prune.p=0.5")
    options = [part for name in chosen for part in ("--setting", name)]
    given = (folder / "model", folder / "recipe.yaml", "--question", "2", *options, "--beside", folder / "narrow/final")
    code, out, err = call(capsys, *given, "--output", folder / "found")
    assert code == 0, err
    assert "At most" not in out
    rows = {row["name"]: row for row in json.loads((folder / "found/decode.json").read_text())["rows"]}
    assert [*rows] == ["dense", *chosen, "narrow (sliding)"]
    few, many = (rows[name] for name in chosen[:2])
    assert few["section"]["refresh"]["keep"] == 4
    assert few["bytes_share"] < many["bytes_share"] < 1
    assert few["error"] > many["error"]
    narrow = rows["narrow (sliding)"]
    assert (narrow["error"], narrow["mass"]) == (None, None)
    assert 0 <= narrow["accuracy"] <= 1
    assert narrow["bytes_share"] == narrow["keys_share"]
    assert (folder / "found/decode.png").stat().st_size > 1000


def test_bytes_of_another_model_are_those_of_the_keys_that_its_steps_read(model, tokenizer, recall):
    """Three documents of 48 tokens and three of 64; of each, eight tokens before the first of three answers, which are
    six tokens, are read step by step, and the last token is not read."""
    sliding = sparsetrain.sparsify(deepcopy(model), {"method": "sliding", "block": 16, "window": 2, "sinks": 0})
    questions = [Question.of(row, 8) for row in recall.answered()]
    found = Answerer(sliding, tokenizer, questions, extra=0, batch=6).answer(None, None)
    places = [place for size in (48, 64) for place in range(size - 6 - 8 + 1, size - 1)]
    read = [place - max(0, place // 16 - 1) * 16 + 1 for place in places]
    assert found.mean("keys") == pytest.approx(sum(read) / len(read))
    assert found.mean("length") == pytest.approx(sum(place + 1 for place in places) / len(places))
    assert found.mean("bytes") == pytest.approx(found.mean("keys") * 2 * 2 * 2 * 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1.5"], "--budget 1.5 is no share"),
        (["--setting", "magic"], "--setting magic is not known; choose from window, twilight"),
        (
            ["--task", "passkey"],
            "--task passkey: recipe.yaml has no task of that name with answers",
        ),
        (["--setting", "prune.p=0.5"], "--setting prune.p=0.5 has no name; write one before its fields"),
        (["--setting", "twilight,0.5"], "--setting twilight,0.5: 0.5 is no field"),
        (["--setting", "twilight,prune.p=2"], "--setting twilight,prune.p=2: decode.prune.p"),
        (["--setting", "twilight,prune.p=[1"], "--setting twilight,prune.p [1 is no value"),
        (["--setting", "twilight,select.p=2"], "--setting twilight,select.p=2: there is no field select.p"),
        (["--setting", "oracle-top-k,prune.p=0.5"], "oracle-top-k has refresh.keep, sinks and recent, but no prune.p"),
        (["--setting", "quest", "--setting", "quest"], "--setting quest is there twice"),
        (["--setting", "quest,candidates=16", "--budget", "0.5"], "--budget 0.5 has no effect"),
        (["--beside", "model"], "--beside model reads all of 64 tokens"),
        (["--question", "60"], "--question 60: the first answer"),
        (["--extra", "9999", "eval.tasks.recall.source={synthetic: passkey, lengths: [128]}"], "lower --extra"),
        (["--dense-layer", "0", "--dense-layer", "1"], "leaves no layer to read fewer keys in"),
        (["train.lr=1"], "train.lr=1 has no effect here"),
        (
            ["eval.tasks.far={task: passkey, lengths: [96]}"],
            "several tasks with answers; name one of recall, far with --t",
        ),
        (["eval.tasks.recall=null"], "recipe.yaml has no task with answers; give eval.tasks one"),
        (["--output", "model"], "exists already"),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    code, out, err = call(capsys, "model", "recipe.yaml", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["snapkv", "h2o", "streamingllm"])
def test_methods_of_kvpress_are_refused_with_the_versions(name):
    """They work with transformers below 5.3, and 5.12 is the oldest that sparsetrain takes."""
    here = re.escape(version("transformers"))
    message = rf"is a method of kvpress.* 0\.5\.5 work with transformers below 5\.3.*beside transformers {here}"
    with pytest.raises(ModelError, match=f"--setting {name} {message}"):
        chosen_settings([Asked(name, name, {})], settings(512, [], 32))
