"""``sparsetrain eval``: what it measures of which model, its rows, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from ports import free_port
from training.preloaded import ensure_running

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.cli.eval_tasks import choose_tasks, read_lengths
from sparsetrain.data.tokens import open_source
from sparsetrain.errors import RecipeError
from sparsetrain.evaluation.journal import Journal
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.row_model import as_row
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.rows import Row, read_attention, read_decoding
from sparsetrain.sole_writer import sole_writer
from sparsetrain.world import World

SPARSEK = {"method": "sparsek", "topk": 16, "window": 16, "sinks": 0, "dense_layers": [0]}
POWER = {"method": "power", "block": 16, "window": 2, "sinks": 1}
TASKS = """
base: quickstart
eval:
  tasks:
    - {task: passkey, lengths: [300, 320], depths: 2, trials: 1, digits: 1}
    - {task: passkey, name: far, lengths: [600], depths: 1, trials: 2, digits: 1}
    - {task: ruler, lengths: [1900], samples: 1, tasks: [vt]}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_model, byte_tokenizer) -> Path:
    """The folder of a run: its recipe and the model that it trained."""
    monkeypatch.chdir(tmp_path)
    sparsetrain.save(sparsetrain.sparsify(tiny_model, POWER), "run/final", byte_tokenizer)
    Path("run/recipe.yaml").write_text(TASKS)
    return Path("run")


def call(*arguments: str) -> dict:
    """The rows that a call measures."""
    assert main(["eval", *arguments, "--output", "result.json"]) == 0
    return json.loads(Path("result.json").read_text())["rows"]


@pytest.fixture
def refused(capsys):
    """Calls the command with a mistake; returns what it says."""

    def refused(*arguments: str) -> str:
        assert main(["eval", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        return captured.err

    return refused


def test_a_file_that_another_process_writes_is_refused_and_left_as_it_is(run, refused):
    with sole_writer("--output", Path("result.json")):
        said = refused("run", "--tasks", "passkey", "--output", "result.json")
    assert "another process writes --output result.json; wait for its end, or name another file" in said
    assert not Path("result.json").exists()
    assert call("run", "--tasks", "passkey")


def test_a_run_and_its_model_are_measured_as_the_recipe_beside_them_says(run, capsys):
    rows = call("run", "--tasks", "passkey,far", "eval.tasks.far.trials=3", "train.seed=5")
    assert list(rows) == ["trained (power)"]
    told = capsys.readouterr()
    assert "to measure: 7 forward passes (passkey 4, far 3)\n" in told.err
    row = rows["trained (power)"]
    assert list(row["tasks"]) == ["passkey", "far"]
    assert (row["attention"]["method"], row["decode"], row["dtype"], row["device"]) == ("power", None, "float32", "cpu")
    assert "trained (power)" in told.out
    section = load_recipe("run/recipe.yaml", ["eval.tasks.ruler=null", "eval.tasks.far.trials=3"]).recipe.eval
    model = sparsetrain.load("run/final")
    tokenizer = sparsetrain.modeling.tokenizers.load_tokenizer("run/final", "path")
    alone = World(0, 1, torch.device("cpu"))
    expected = evaluate(model, tokenizer, section, alone, seed=5)
    assert row["tasks"] == expected.model_dump(mode="json")["tasks"]
    arguments = ["--tasks", "passkey,far", "eval.tasks.far.trials=3", "train.seed=5"]
    assert call("run/final", *arguments) == call(str(Path("run/final").absolute()), *arguments) == rows


def test_another_model_is_measured_by_tasks_and_lengths_alone(run):
    rows = call("run/final", "quickstart", "--tasks", "passkey", "--lengths", "256,0.5k")
    assert rows["trained (power)"]["tasks"]["passkey"]["lengths"] == [256, 512]
    Path("run/recipe.yaml").unlink()
    settings = ["--lengths", "300", "eval.tasks.passkey.trials=1", "eval.tasks.recall.documents=2"]
    tasks = call("run/final", "--tasks", "recall,passkey", *settings)["trained (power)"]["tasks"]
    assert (tasks["passkey"]["lengths"], tasks["passkey"]["trials"]) == ([300], 1)
    tasks = call("run/final", "--tasks", "passkey", "eval.tasks.passkey.trials=1")["trained (power)"]["tasks"]
    assert tasks["passkey"]["lengths"] == [512, 1024, 2048], "three powers of two up to the positions of the model"
    tasks = call(
        "run/final", "eval.tasks.near={task: passkey, lengths: [400], depths: 1, trials: 1}", "--lengths", "300"
    )
    assert tasks["trained (power)"]["tasks"]["near"]["lengths"] == [300]


def test_numbers_of_a_model_that_overflows_are_plain_json(run):
    model = sparsetrain.load("run/final")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained("run/final")
    call("run", "--tasks", "perplexity", "--lengths", "64", "eval.tasks.perplexity.tokens=200")
    row = json.loads(Path("result.json").read_text(), parse_constant=pytest.fail)["rows"]["trained (power)"]
    result = EvalResult.model_validate({"tasks": row["tasks"]})
    assert math.isnan(result.tasks["perplexity"].perplexity[64])


def test_attention_of_training_and_others_are_rows_with_their_differences(run, capsys, monkeypatch):
    Path("sliding.yaml").write_text("base: quickstart\nattention: {method: sliding, block: 32, window: 1}\n")
    given = ["trained", "dense", "{method: sliding, block: 16, window: 1}", "sliding.yaml"]
    Path("text.txt").write_text(" ".join(f"It was {number} years ago." for number in range(40)))
    measure = ["--tasks", "perplexity", "--lengths", "256", "eval.tasks.perplexity.tokens=600"]
    measure.append("eval.tasks.perplexity.source={path: text.txt}")
    read = []
    monkeypatch.setattr(
        "sparsetrain.data.tokens.open_source", lambda *args, **kw: read.append(1) or open_source(*args, **kw)
    )
    rows = call("run", *measure, *flags(given))
    assert len(read) == 1, "the text is read once for all rows"
    assert list(rows) == ["trained (power)", "dense", "sliding block=16 window=1", "sliding of sliding"]
    found = [row["tasks"]["perplexity"]["perplexity"]["256"] for row in rows.values()]
    assert len({round(each, 6) for each in found}) == 4
    assert rows["dense"]["attention"]["method"] == "full"
    said = " ".join(capsys.readouterr().out.split())
    assert "Beside one another (in brackets: the difference to trained (power))" in said
    assert f"perplexity/256 {found[0]:.4g} {found[1]:.4g} ({found[1] - found[0]:+.4g})" in said
    alone = call("run", *measure, *flags(["dense"]))
    assert alone == {"dense": rows["dense"]}, "no matter what was measured before"


def flags(attentions: list[str]) -> list[str]:
    return [word for each in attentions for word in ("--attention", each)]


def test_decode_settings_are_rows_and_tasks_that_do_not_write_are_measured_once(run, capsys, monkeypatch):
    counted = []
    monkeypatch.setattr(Journal, "add", counting_add(counted))
    arguments = ["--attention", "dense", "--decode", "none", "--decode", "twilight,prune.p=0.5,dense_layers=[]"]
    rows = call("run", *arguments, "--decode", "select=quest,candidates=16,dense_layers=[0]")
    assert list(rows) == [
        "dense, none",
        "dense, twilight,prune.p=0.5,dense_layers=[]",
        "dense, select=quest,candidates=16,dense_layers=[0]",
    ]
    none, twilight, quest = rows.values()
    assert (none["decode"], twilight["decode"]["prune"]["p"], quest["decode"]["candidates"]) == (None, 0.5, 16)
    assert [task for task, *_ in counted] == ["passkey"] * 4 + ["far"] * 2 + ["ruler"] * 3
    assert none["tasks"]["passkey"] == twilight["tasks"]["passkey"] == quest["tasks"]["passkey"]


def test_rows_of_a_recipe_follow_the_model_as_it_is(run, capsys):
    rows = "rows: [{attention: dense}, {decode: none}, {attention: dense, decode: 'twilight,dense_layers=[]'}]"
    Path("run/recipe.yaml").write_text(TASKS.replace("eval:", f"eval:\n  {rows}"))
    short = ("run", "--tasks", "far")
    assert list(call(*short)) == ["trained (power)", "dense"]
    notes = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert notes == [
        f"note: the recipe's row {row} is left out: far write no texts"
        for row in ("trained, none", "dense, twilight,dense_layers=[]")
    ]
    assert list(call(*short, "--attention", "trained")) == ["trained (power)"]
    every = ["trained (power)", "trained (power), none", "dense", "dense, twilight,dense_layers=[]"]
    capsys.readouterr()
    assert list(call("run", "eval.tasks.passkey=null")) == every
    told = ", for each of 4 rows; run/recipe.yaml asks for them, --tasks NAME for some of them\n"
    assert told in capsys.readouterr().err


def test_a_model_is_what_it_was_behind_a_row(tiny_model):
    model = sparsetrain.set_decode(sparsetrain.sparsify(tiny_model, SPARSEK), {"prune": {"p": 0.5}, "dense_layers": []})
    ids = torch.arange(64)[None] % 50
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    record = dict(model.config.sparsetrain)
    for attention, decode in (("dense", "recorded"), ("dense", "twilight,dense_layers=[]"), ("trained", "none")):
        with as_row(model, Row(read_attention(attention), read_decoding(decode))):
            assert (model.config.sparsetrain["attention"]["method"] == "full") == (attention == "dense")
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.config.sparsetrain == record


def counting_add(counted: list, stop_after: int | None = None):
    add = Journal.add

    def counting(self, key, record):
        if len(counted) == stop_after:
            raise KeyboardInterrupt
        counted.append(key)
        add(self, key, record)

    return counting


def test_the_same_command_goes_on_where_it_was_stopped(run, capsys, monkeypatch):
    arguments = ["eval", "run", "--attention", "trained", "--attention", "dense"]
    assert main([*arguments, "--output", "whole.json"]) == 0
    counted = []
    with monkeypatch.context() as stopping:
        stopping.setattr(Journal, "add", counting_add(counted, stop_after=9))
        assert main([*arguments, "--output", "result.json"]) == 130
    told = capsys.readouterr()
    assert "stopped: the same command goes on from here" in told.err
    assert "trained (power)" in told.out, "what is done is printed"
    assert list(json.loads(Path("result.json").read_text())["rows"]) == ["trained (power)"], "what is done is written"
    with monkeypatch.context() as counting:
        counting.setattr(Journal, "add", counting_add(counted))
        assert main([*arguments, "--output", "result.json"]) == 0
    assert len(counted) == 14, "no batch twice"
    assert "note: dense: 2 finished batches are taken from result.samples" in capsys.readouterr().err
    assert Path("result.json").read_bytes() == Path("whole.json").read_bytes()

    # The same folder may have another model since.
    model = sparsetrain.load("run/final")
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    model.save_pretrained("run/final")
    assert main([*arguments[:2], "--tasks", "far", "--output", "result.json"]) == 0
    file = "result.samples/trained-power.rank0.jsonl"
    said = capsys.readouterr().err
    assert f"note: trained (power): {file} is not used: it is of other weights" in said
    assert main([*arguments[:2], "--tasks", "far", "--output", "result.json", "--fresh"]) == 0
    assert "note" not in capsys.readouterr().err

    # The same weights may be computed otherwise since, or their texts end elsewhere.
    for written, field, value in (("config.json", "hidden_act", "gelu"), ("generation_config.json", "eos_token_id", 7)):
        settings = json.loads(Path("run/final", written).read_text())
        Path("run/final", written).write_text(json.dumps({**settings, field: value}))
        assert main([*arguments[:2], "--tasks", "far", "--output", "result.json"]) == 0
        other = {"hidden_act": "config", "eos_token_id": "end_tokens"}[field]
        assert f"note: trained (power): {file} is not used: it is of other {other}\n" in capsys.readouterr().err


def evaluate_on_rank(rank: int, port: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    code = main(arguments)
    torch.distributed.destroy_process_group()
    assert code == 0


def test_ranks_share_the_samples_and_one_tells(run):
    arguments = ["eval", "run", "--attention", "trained", "--attention", "dense"]
    assert main([*arguments, "--output", "one.json"]) == 0
    ensure_running()
    given = (free_port(), [*arguments, "--output", "two.json"])
    multiprocessing.start_processes(evaluate_on_rank, given, nprocs=2, start_method="forkserver")
    assert Path("two.json").read_bytes() == Path("one.json").read_bytes()
    assert "trained (power)" in Path("0.out").read_text()
    assert Path("1.out").read_text() == ""
    shares = [len(Path(f"two.samples/dense.rank{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert shares == [5, 4], "a line for the head, and 4 and 3 of the batches"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", "--tasks", "pasky"],
            "--tasks pasky: there is no such task; did you mean passkey? run/recipe.yaml has",
        ),
        (["run", "--tasks", ","], "--tasks is empty; give names such as perplexity,passkey"),
        (["run", "--tasks", "far,far"], "--tasks has far 2 times; each task is measured once"),
        (["run", "--lengths", "1k,1024"], "--lengths 1k,1024: 1024 is there twice; each length is measured once"),
        (["run", "eval.tasks.ruler.tasks=[vt,vt]"], "eval.tasks.ruler.tasks: has vt 2 times; each is measured once"),
        (["run", "--lengths", "4q"], "--lengths 4q: 4q is no number of tokens such as 4k, 512 or 1m"),
        (["run", "--tasks", "far", "eval.tasks.passkey.trials=2"], "--tasks leaves passkey of run/recipe.yaml out"),
        (["run", "eval.tasks.far.trails=2"], "eval.tasks.far.trails: unknown key; did you mean eval.tasks.far.trials?"),
        (["run", "attention.method=full"], "attention.method=full has no effect here: only the eval section"),
        (["run", "--attention", "powr"], "--attention powr is not known; give trained, dense, a method (full, power,"),
        (["run", "--attention", "{method: power, blok: 3}"], "there is no 'blok', did you mean block?"),
        (["run", "--attention", "dense", "--attention", "dense"], "--attention has dense twice; give it once"),
        (["run", "--tasks", "far", "--decode", "none"], "--decode has no effect on far, which write no texts; add a"),
        (
            ["run", "--tasks", "attention_error", "--lengths", "1k", "--decode", "quest"],
            "attention_error is of one pass over a text, and decode settings choose keys in the steps behind one: "
            "sparsetrain compare-decode measures the error of such steps, beside oracles of as many bytes; add a task",
        ),
        (["run", "--decode", "twilit"], "decode=twilit is not known; choose one of twilight, twilight-full, quest"),
        (["run", "--decode", "twilight,p"], "--decode twilight,p: p is no field; write a setting, then fields such as"),
        (["run", "--decode", "none,prune.p=1"], "--decode none reads all keys, so --decode.prune.p would have no"),
        (["run", "--decode", "quest"], "decode.select=quest does not go with"),
        (
            ["run", "--resume"],
            "--resume has no effect without --output, beside which finished samples are kept",
        ),
        (
            ["run", "--output", "nowhere/result.json"],
            "--output nowhere/result.json: there is no such folder to write",
        ),
        (["run", "--output", "run"], "--output run is a folder; name a file"),
        (["run", "--output", "run/recipe.yaml"], "run/recipe.yaml exists already and is no result of eval"),
        (["run", "--output", "run/final/config.json"], "config.json exists already and is no result of eval"),
        (["run", "--tasks", "ppl"], "--tasks ppl: there is no such task; run/recipe.yaml has passkey, far, ruler;"),
        ([".", "--tasks", "passkey"], "RUN_OR_MODEL='.' is no run and no model; name a run: run"),
        (
            ["run/empty", "--tasks", "passkey"],
            "RUN_OR_MODEL='run/empty' holds no model (no config.json or adapter_config.json)",
        ),
        (["./rnu", "--tasks", "passkey"], "RUN_OR_MODEL='./rnu': there is no such folder"),
        (["run", "--tasks", "perplexity", "eval.tasks.perplexity.source={path: gone.txt}"], "gone.txt"),
        (["run/final", "gone.yaml"], "there is no recipe gone.yaml"),
        (["sparsetrain:tiny"], "nothing says what to measure of sparsetrain:tiny, which is not of a run: name tasks"),
        (["sparsetrain:tiny", "--tasks", "passkey", "--lengths", "8"], "eval.tasks.passkey.lengths: "),
        (
            ["run", "--tasks", "perplexity", "--lengths", "1k", "eval.tasks.perplexity.tokens=9"],
            "9 tokens hold no window",
        ),
    ],
)
def test_mistakes_are_told_before_weights_are_read(run, refused, monkeypatch, arguments, said):
    monkeypatch.setattr("sparsetrain.inference.models.Source.load", lambda *_: pytest.fail("the weights were read"))
    Path("run/empty").mkdir(exist_ok=True)
    assert said in refused(*arguments)


def test_a_model_that_attends_fully_is_dense(run, refused, tiny_model, byte_tokenizer, capsys):
    sparsetrain.save(sparsetrain.sparsify(tiny_model, {"method": "full"}), "plain", byte_tokenizer)
    assert list(call("plain", "run/recipe.yaml", "--tasks", "far")) == ["dense"]
    capsys.readouterr()
    said = refused("plain", "run/recipe.yaml", "--attention", "trained", "--attention", "dense")
    assert "--attention trained is dense: this model attends fully; drop one of the two" in said


def test_a_method_that_leaves_no_key_out_is_named(run, capsys):
    call("run", "--tasks", "far", "--attention", "trained", "--attention", "sliding", "--attention", "dense")
    notes = [line for line in capsys.readouterr().err.splitlines() if "leaves no key out" in line]
    assert notes == [
        "note: sliding leaves no key out of 600 tokens, the most that are measured: the row says nothing of sparse "
        "attention; give longer --lengths, or other fields of the method"
    ]


def test_a_source_that_is_named_takes_nothing_of_the_usual_one():
    settings = ["eval.tasks.perplexity.source.path=book.txt", "eval.tasks.perplexity.tokens=900"]
    (task,) = choose_tasks("my-model", settings, ["perplexity"], [512], lambda: None).section.tasks
    assert (task.source.path, task.source.split, task.tokens) == ("book.txt", "train", 900), "not validation"


def test_lengths_are_in_tokens_or_thousands_of_them():
    assert read_lengths("16K, 4k,512,1.5k,1m") == [512, 1536, 4096, 16384, 1048576]
    for text in ("", "k", "-4k", "1.0001k", "0", "999m", "4k,4096"):
        with pytest.raises(RecipeError, match="--lengths"):
            read_lengths(text)
